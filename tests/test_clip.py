"""Loading a CLIP: weights are required, QuickGELU is as they were trained, and what features depend on is known."""

import io
import json
import shutil
import zipfile

import open_clip
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision import transforms as T

from selectsampler import embed
from selectsampler.embeddings.clip import load_clip, open_clip_arguments, resolve_device

pytestmark = pytest.mark.filterwarnings("error::UserWarning")

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


# Names


@pytest.mark.parametrize(
    ("name", "model", "tag", "quick_gelu"),
    [
        ("ViT-B-32/openai", "ViT-B-32", "openai", True),  # open_clip 3 would go on with plain GELU
        ("ViT-L-14/openai", "ViT-L-14", "openai", True),
        ("RN50/openai", "RN50", "openai", True),
        ("ViT-B-32/metaclip_400m", "ViT-B-32", "metaclip_400m", True),
        ("ViT-B-32-quickgelu/openai", "ViT-B-32-quickgelu", "openai", True),
        ("ViT-B-32/laion2b_s34b_b79k", "ViT-B-32", "laion2b_s34b_b79k", False),
        ("ViT-B-32/datacomp_xl_s13b_b90k", "ViT-B-32", "datacomp_xl_s13b_b90k", False),
    ],
)
def test_the_weights_say_whether_they_need_quick_gelu(name, model, tag, quick_gelu):
    assert open_clip_arguments(name) == {"model_name": model, "pretrained": tag, "force_quick_gelu": quick_gelu}


@pytest.mark.parametrize("name", ["local-dir:/models/mine", "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K"])
def test_folders_and_hubs_bring_their_own_config(name):
    assert open_clip_arguments(name) == {"model_name": name}


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-32/", "ViT-B-32/opnai", "ViT-B-32/ViT-B-32/openai"])
def test_a_name_without_weights_is_refused_and_the_weights_are_listed(name):
    with pytest.raises(ValueError, match=rf"'{name}' names no weights, .* Weights of ViT-B-32: openai, laion400m_e31"):
        load_clip(name)


@pytest.mark.parametrize(
    ("name", "close"), [("ViT-B/32", "ViT-B-32"), ("vit-b-32/openai", "ViT-B-32"), ("Bert", "list_models")]
)
def test_an_unknown_architecture_is_refused_and_close_ones_are_named(name, close):
    with pytest.raises(
        ValueError, match=rf"open_clip knows no architecture '.*' \(.*{close}.*\)\. Give clip as ARCH/TAG"
    ):
        load_clip(name)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"open_clip could not load 'local-dir:.*nowhere'\. A local-dir: needs"):
        load_clip(f"local-dir:{tmp_path}/nowhere")


@pytest.fixture
def local_folder(tmp_path, tiny_clip):
    """The tiny model as an open_clip `local-dir:`, still without weights."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16},
        "text_cfg": {"context_length": 24, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return tmp_path


def test_a_folder_without_weights_is_refused(local_folder):
    with pytest.raises(ValueError, match=r"could not load 'local-dir:.*'\. A local-dir: needs"):
        load_clip(f"local-dir:{local_folder}")


def test_a_folder_with_truncated_weights_is_refused(local_folder, tiny_clip):
    from safetensors.torch import save

    (local_folder / "open_clip_model.safetensors").write_bytes(save(tiny_clip[0].state_dict())[:-100])
    with pytest.raises(ValueError, match=r"could not load 'local-dir:.*It says: "):
        load_clip(f"local-dir:{local_folder}")


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_a_folder_is_loaded_with_its_weights_and_its_activation(local_folder, tiny_clip_of, quick_gelu):
    from safetensors.torch import save_file

    config = json.loads((local_folder / "open_clip_config.json").read_text())
    config["model_cfg"]["quick_gelu"] = quick_gelu
    (local_folder / "open_clip_config.json").write_text(json.dumps(config))
    handed_over = load_clip(tiny_clip_of(quick_gelu=quick_gelu), device="cpu")
    save_file(handed_over.model.state_dict(), local_folder / "open_clip_model.safetensors")
    loaded = load_clip(f"local-dir:{local_folder}", device="cpu")
    assert loaded.weights == handed_over.weights
    assert loaded.quick_gelu is handed_over.quick_gelu is quick_gelu


# A model that is handed over


def test_a_model_is_put_into_evaluation_mode(tiny_clip_of):
    model, *others = tiny_clip_of()
    assert not load_clip((model.train(), *others), device="cpu").model.training


def test_the_temperature_is_the_models_own(tiny_clip):
    assert load_clip(tiny_clip, device="cpu").temperature == pytest.approx(0.07)


@pytest.mark.parametrize("clip", [(), ("model", "preprocess"), {"model": 1}, None])
def test_a_model_comes_with_preprocessing_and_tokenizer(clip):
    with pytest.raises(ValueError, match=r"clip must be a name or a triple \(model, preprocess, tokenizer\)"):
        load_clip(clip)


def test_a_model_that_is_no_clip_is_refused(tiny_clip):
    with pytest.raises(ValueError, match="but the model lacks encode_image, encode_text, logit_scale"):
        load_clip((torch.nn.Linear(2, 2), *tiny_clip[1:]))


def test_a_preprocessing_that_cannot_be_called_is_refused(tiny_clip):
    with pytest.raises(ValueError, match="but preprocess or tokenizer cannot be called"):
        load_clip((tiny_clip[0], None, tiny_clip[2]))


@pytest.mark.parametrize(
    "preprocess",
    [
        open_clip.image_transform(16, is_train=True),
        T.Compose([T.Resize((16, 16)), T.RandomHorizontalFlip(), T.ToTensor()]),  # shows in every other call
    ],
)
def test_a_random_preprocessing_is_refused(tiny_clip, preprocess):
    with pytest.raises(ValueError, match="preprocess is random: give CLIP's evaluation preprocessing"):
        load_clip((tiny_clip[0], preprocess, tiny_clip[2]))


def test_a_preprocessing_that_makes_no_tensor_is_refused(tiny_clip):
    with pytest.raises(ValueError, match=r"preprocess must turn a PIL image into a tensor of shape \(3, H, W\)"):
        load_clip((tiny_clip[0], T.Resize(16), tiny_clip[2]))


# What features depend on


def test_a_model_that_is_loaded_twice_is_the_same(tiny_clip_of):
    first, second = (load_clip(tiny_clip_of(), device="cpu").identity() for _ in range(2))
    assert first == second


def other_weights(model, preprocess, tokenizer, tiny_clip_of):
    return tiny_clip_of(seed=1)[0], preprocess, tokenizer


def other_activation(model, preprocess, tokenizer, tiny_clip_of):
    return tiny_clip_of(quick_gelu=True)[0], preprocess, tokenizer  # not one weight differs


def other_interpolation(model, preprocess, tokenizer, tiny_clip_of):
    return model, open_clip.image_transform(16, is_train=False, interpolation="bilinear"), tokenizer


def other_mean(model, preprocess, tokenizer, tiny_clip_of):
    return model, open_clip.image_transform(16, is_train=False, mean=(0.5, 0.5, 0.5)), tokenizer


class Unnamed:
    """A preprocessing that does not say what it does."""

    def __init__(self, size, brightness):
        self.transform = T.Compose([T.Resize((size, size)), T.ToTensor(), lambda pixels: pixels * brightness])

    def __call__(self, image):
        return self.transform(image)

    def __repr__(self):
        return "Unnamed()"


@pytest.mark.parametrize("change", [other_weights, other_activation, other_interpolation, other_mean])
def test_whatever_changes_the_features_changes_the_identity(change, tiny_clip, tiny_clip_of):
    before = load_clip(tiny_clip, device="cpu").identity()
    assert load_clip(change(*tiny_clip, tiny_clip_of), device="cpu").identity() != before


def test_precision_is_part_of_the_identity(tiny_clip):
    identities = [
        load_clip(tiny_clip, device="cpu", precision=precision).identity() for precision in ("fp32", "amp_bf16")
    ]
    assert [identity.pop("precision") for identity in identities] == ["fp32", "amp_bf16"]
    assert identities[0] == identities[1]


def test_preprocessings_of_one_name_are_told_apart_by_what_they_do(tiny_clip):
    clips = [load_clip((tiny_clip[0], Unnamed(16, light), tiny_clip[2]), device="cpu") for light in (1, 1, 1.01)]
    assert clips[0].preprocessing == clips[1].preprocessing != clips[2].preprocessing


def test_one_weight_of_many_changes_the_identity(tiny_clip_of):
    model, *others = tiny_clip_of()
    before = load_clip((model, *others), device="cpu").weights
    with torch.no_grad():
        model.visual.proj[3, 5] += 1e-6
    assert load_clip((model, *others), device="cpu").weights != before


@pytest.mark.parametrize("precision", ["fp16", "half", "bf16"])
def test_an_unknown_precision_is_refused(tiny_clip, precision):
    with pytest.raises(ValueError, match=f"precision is '{precision}', but it must be one of fp32, amp, amp_bf16"):
        load_clip(tiny_clip, precision=precision)


def test_the_cpu_computes_in_full_precision_unless_told_otherwise(tiny_clip):
    assert load_clip(tiny_clip, device="cpu").precision == "fp32"


def test_auto_takes_the_best_device_there_is(monkeypatch):
    for cuda, mps, expected in [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=cuda: there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=mps: there)
        assert resolve_device("auto") == torch.device(expected)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)


# Features


def test_features_are_float32_and_may_be_trained_on(tiny_clip):
    clip = load_clip(tiny_clip, device="cpu")
    images = clip.encode_images(torch.rand(3, 3, 16, 16))
    texts = clip.encode_texts(tiny_clip[2](["a cat", "a dog"]))
    assert [features.dtype for features in (images, texts)] == [torch.float32] * 2
    assert_close(texts.norm(dim=1), torch.ones(2))
    for features in (images, texts):
        layer = torch.nn.Linear(16, 1)
        layer(features).sum().backward()  # would fail on a tensor made in inference mode
        assert not features.requires_grad


def test_reduced_precision_comes_close(tiny_clip):
    pixels = torch.rand(8, 3, 16, 16)
    full, reduced = (
        load_clip(tiny_clip, device="cpu", precision=precision).encode_images(pixels)
        for precision in ("fp32", "amp_bf16")
    )
    assert reduced.dtype == torch.float32
    assert 0 < (full - reduced).norm() < 0.02 * full.norm()


def read_pool(archive, per_class):
    """The first images of each class, as (PIL image, label)."""
    with zipfile.ZipFile(archive) as file:
        return [
            (Image.open(io.BytesIO(file.read(f"cifar10/train/{name}/{number:04}.jpg"))), label)
            for label, name in enumerate(CIFAR10)
            for number in range(per_class)
        ]


def test_a_trained_model_gives_the_rows_of_a_plain_open_clip_loop(shared_clip, cifar_zip):
    pairs = read_pool(cifar_zip, per_class=3)
    embeddings = embed(pairs, shared_clip, class_names=CIFAR10, device="cpu", batch_size=7)
    model, preprocess = open_clip.create_model_from_pretrained(shared_clip)
    model.eval()
    tokenize = open_clip.get_tokenizer(shared_clip)
    with torch.no_grad():
        images = torch.cat([model.encode_image(preprocess(image)[None]) for image, _ in pairs])
        texts = model.encode_text(tokenize([f"A photo of a {name}" for name in CIFAR10]), normalize=True)
    assert embeddings.image.dtype == torch.float16
    assert_close(embeddings.image.float(), images, rtol=2e-3, atol=1e-3)
    assert_close(embeddings.text, texts)
    assert embeddings.temperature == pytest.approx(1 / 6.47, rel=1e-3)


@pytest.mark.slow
def test_a_trained_model_knows_most_of_the_pool(shared_clip, cifar_zip):
    """79.3 % of the pool's 25,000 images; of the 2,500 here within 3 points, which is 3.7 standard deviations."""
    embeddings = embed(read_pool(cifar_zip, per_class=250), shared_clip, class_names=CIFAR10, device="cpu")
    guesses = (embeddings.image.float() @ embeddings.text.T).argmax(dim=1)
    accuracy = (guesses == embeddings.labels).float().mean()
    assert abs(float(accuracy) - 0.793) < 0.03


def test_a_folder_may_be_moved(shared_clip, tmp_path):
    folder = shared_clip.removeprefix("local-dir:")
    shutil.copytree(folder, tmp_path / "moved")
    moved, here = (load_clip(name, device="cpu") for name in (f"local-dir:{tmp_path / 'moved'}", shared_clip))
    assert moved.identity() == here.identity()
