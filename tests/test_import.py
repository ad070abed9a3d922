"""`import selectsampler` costs next to nothing: heavy packages wait until they are used."""

import subprocess
import sys


def modules_after(statement):
    code = f"import sys; {statement}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_package_imports_no_torch_and_no_framework():
    heavy = {"torch", "open_clip", "timm", "torchvision", "torchdata", "sklearn", "matplotlib"}
    assert not heavy & modules_after("import selectsampler")


def test_the_tensor_side_needs_no_image_library():
    loaded = modules_after("from selectsampler import SelectSampler, select, score, adapt, Reselect")
    assert not {"open_clip", "timm", "torchvision", "transformers"} & loaded


def test_every_public_name_is_there():
    import selectsampler

    for name in selectsampler.__all__:
        assert getattr(selectsampler, name) is not None
    assert set(selectsampler.__all__) <= set(dir(selectsampler))


def test_an_unknown_name_is_an_attribute_error():
    import pytest

    import selectsampler

    with pytest.raises(AttributeError, match="no attribute 'selekt'"):
        selectsampler.selekt  # noqa: B018
