"""embed() gives the rows of a plain CLIP loop, once for each image, and says what is wrong; Embeddings keep them."""

import json
import os
import re

import numpy as np
import open_clip
import pytest
import timm.data
import torch
from helpers import make_images
from PIL import Image
from torch.testing import assert_close
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from selectsampler import Embeddings, UnreadableImages, embed
from selectsampler.embeddings import STATISTICS, encode
from selectsampler.embeddings.statistics import image_statistics

pytestmark = pytest.mark.filterwarnings("error::UserWarning")

NAMES = ["cat", "dog", "owl"]
TRAINING = T.Compose([T.RandomResizedCrop(8), T.ToTensor()])


def run(dataset, clip, **options):
    return embed(dataset, clip, **{"class_names": NAMES, "device": "cpu", **options})


def assert_same(first, second):
    """Bit for bit."""
    for name in ("image", "text", "labels", "image_statistics"):
        assert_close(getattr(first, name), getattr(second, name), rtol=0, atol=0)
    assert (first.readable is None) == (second.readable is None)
    assert first.readable is None or torch.equal(first.readable, second.readable)


class Counted:
    """A model's triple, with the numbers of images and prompts that went through it."""

    def __init__(self, triple, monkeypatch):
        self.model, self.preprocess, self.tokenizer = triple
        self.images = self.prompts = 0
        encode_image, encode_text = self.model.encode_image, self.model.encode_text

        def counted_images(pixels):
            self.images += len(pixels)
            return encode_image(pixels)

        def counted_prompts(tokens):
            self.prompts += len(tokens)
            return encode_text(tokens)

        monkeypatch.setattr(self.model, "encode_image", counted_images)
        monkeypatch.setattr(self.model, "encode_text", counted_prompts)

    def during(self, dataset, **options):
        """(images, prompts) that one run of embed took, after its result."""
        before = self.images, self.prompts
        result = run(dataset, (self.model, self.preprocess, self.tokenizer), **options)
        return result, (self.images - before[0], self.prompts - before[1])


@pytest.fixture
def counted(tiny_clip, monkeypatch):
    return Counted(tiny_clip, monkeypatch)


@pytest.fixture
def small_shards(monkeypatch):
    """Four images a shard, so that a dozen images fill three."""
    monkeypatch.setattr(encode, "SHARD", 4)


class OnTheFly(Dataset):
    """A data set of a user's own: neither files, nor arrays, nor labels can be seen from outside."""

    def __init__(self, pairs, transform=TRAINING):
        self.pairs, self.transform = pairs, transform

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        image, label = self.pairs[index]
        return (self.transform(image) if self.transform else image), label


# What embed returns


def plain_loop(images, clip):
    model, preprocess, _ = clip
    with torch.no_grad():
        return torch.cat([model.encode_image(preprocess(image.convert("RGB"))[None]) for image in images])


@pytest.mark.parametrize("batch_size", [1, 5, 256])
def test_image_rows_are_those_of_a_plain_open_clip_loop_in_the_order_of_the_data(pairs, tiny_clip, batch_size):
    embeddings = run(pairs, tiny_clip, batch_size=batch_size)
    assert embeddings.image.dtype == torch.float16
    assert_close(embeddings.image.float(), plain_loop([image for image, _ in pairs], tiny_clip), rtol=1e-3, atol=1e-3)
    assert embeddings.labels.tolist() == [0, 1, 2] * 4


def test_lengths_are_the_models_own(pairs, tiny_clip):
    lengths = run(pairs, tiny_clip).image.float().norm(dim=1)
    assert lengths.min() > 2
    assert lengths.std() > 0.01


def test_images_go_through_the_model_once_in_batches(pairs, counted):
    assert counted.during(pairs, batch_size=5)[1] == (12, 3)


def test_statistics_are_those_of_the_stored_pixels(pairs, tiny_clip):
    statistics = run(pairs, tiny_clip).image_statistics
    assert statistics.shape == (12, len(STATISTICS))
    expected = np.stack([image_statistics(np.asarray(image)) for image, _ in pairs])
    assert_close(statistics, torch.from_numpy(expected), rtol=0, atol=0)


def test_the_default_prompt_is_a_photo_of_the_class(pairs, tiny_clip):
    model, _, tokenizer = tiny_clip
    with torch.no_grad():
        expected = model.encode_text(
            tokenizer(["A photo of a cat", "A photo of a dog", "A photo of a owl"]), normalize=True
        )
    text = run(pairs, tiny_clip).text
    assert text.dtype == torch.float32
    assert_close(text, expected)


@pytest.mark.parametrize(
    "templates",
    [
        ["a {}.", "the {}!", "{} {}"],
        [lambda name: f"a {name}.", lambda name: f"the {name}!", "{} {}"],
        ("a {}.", "the {}!", lambda name: f"{name} {name}"),
    ],
)
def test_the_unit_features_of_several_prompts_are_averaged(pairs, tiny_clip, templates):
    model, _, tokenizer = tiny_clip
    with torch.no_grad():
        parts = [
            model.encode_text(tokenizer([f"a {name}.", f"the {name}!", f"{name} {name}"]), normalize=True)
            for name in NAMES
        ]
    text = run(pairs, tiny_clip, templates=templates).text
    assert_close(text, torch.stack([part.mean(dim=0) for part in parts]))
    assert text.norm(dim=1).max() < 1  # a mean, not set to unit length again


@pytest.mark.parametrize("template", ["the {}!", lambda name: f"the {name}!"])
def test_one_template_may_stand_alone(pairs, tiny_clip, template):
    assert_close(run(pairs, tiny_clip, templates=template).text, run(pairs, tiny_clip, templates=["the {}!"]).text)


def test_open_clips_own_templates_are_taken(pairs, tiny_clip):
    templates = open_clip.OPENAI_IMAGENET_TEMPLATES
    prompts = [[template(name) for template in templates] for name in NAMES]
    _, _, tokenizer = tiny_clip
    with torch.no_grad():
        expected = torch.stack([tiny_clip[0].encode_text(tokenizer(p), normalize=True).mean(dim=0) for p in prompts])
    assert_close(run(pairs, tiny_clip, templates=templates).text, expected)


def test_a_class_name_with_braces_is_a_name(pairs, tiny_clip):
    text = run(pairs, tiny_clip, class_names=["{}", "{dog}", "owl"], templates="a {}").text
    with torch.no_grad():
        expected = tiny_clip[0].encode_text(tiny_clip[2](["a {}", "a {dog}", "a owl"]), normalize=True)
    assert_close(text, expected)


@pytest.mark.parametrize("templates", ["a photo", ["a {}", "a photo"], []])
def test_a_template_without_a_place_for_the_name_is_refused(pairs, tiny_clip, templates):
    with pytest.raises(ValueError, match=r"Templates need a {} for the class name: "):
        run(pairs, tiny_clip, templates=templates)


def test_the_provenance_names_what_features_depend_on(pairs, tiny_clip):
    embeddings = run(pairs, tiny_clip)
    found = json.loads(json.dumps(embeddings.provenance))
    assert {"clip", "weights", "preprocessing", "precision", "quick_gelu", "fingerprint", "inputs", "prompts"} == set(
        found
    )
    assert found["precision"] == "fp32"
    assert found["prompts"] == ["A photo of a cat"]
    assert embeddings.temperature == pytest.approx(0.07)


def test_features_may_be_trained_on(pairs, tiny_clip):
    embeddings = run(pairs, tiny_clip)
    for features in (embeddings.image.float(), embeddings.text):
        torch.nn.Linear(16, 1)(features).sum().backward()


def test_embedding_draws_no_random_numbers_from_the_global_generator(pairs, tiny_clip, tmp_path):
    """Else a training script would see other weights in its first run than in the next, which finds the cache."""
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        run(pairs, tiny_clip, cache_dir=tmp_path)
        draws.append(torch.rand(()))
    torch.manual_seed(0)
    assert [*draws, draws[0]] == [torch.rand(())] * 3


# Kinds of data sets (test_datasets.py looks closer)


def test_a_training_transform_is_not_applied_and_stays(folder, tiny_clip):
    dataset = ImageFolder(folder, transform=TRAINING)
    before = dict(vars(dataset))
    embeddings = run(dataset, tiny_clip)
    images = [Image.open(path) for path, _ in dataset.samples]
    assert_close(embeddings.image.float(), plain_loop(images, tiny_clip), rtol=1e-3, atol=1e-3)
    assert vars(dataset) == before
    assert dataset.transform is dataset.transforms.transform is TRAINING
    assert isinstance(dataset[0][0], torch.Tensor)


def test_all_ways_to_the_same_images_give_the_same_rows(folder, tiny_clip):
    by_torchvision = run(ImageFolder(folder, transform=TRAINING), tiny_clip)
    images = [(Image.open(path).copy(), label) for path, label in ImageFolder(folder).samples]
    parts = [Subset(ImageFolder(folder), range(5)), Subset(images, range(5, 12))]
    for dataset in (
        timm.data.create_dataset("", root=str(folder), transform=TRAINING),
        images,
        ConcatDataset(parts),
        OnTheFly(images),
    ):
        assert_same(run(dataset, tiny_clip), by_torchvision)


def test_a_subset_gives_its_rows(folder, tiny_clip):
    whole, part = (run(dataset, tiny_clip) for dataset in (ImageFolder(folder), Subset(ImageFolder(folder), [9, 2, 5])))
    assert_close(part.image, whole.image[[9, 2, 5]], rtol=1e-3, atol=1e-3)
    assert part.labels.tolist() == [2, 0, 1]
    assert part.keys == ["owl/0001.png", "cat/0002.png", "dog/0001.png"]


@pytest.mark.parametrize("fingerprint", ["auto", "content"])
def test_workers_change_nothing(folder, tiny_clip, fingerprint):
    alone, together = (
        run(
            timm.data.create_dataset("", root=str(folder)),
            tiny_clip,
            batch_size=5,
            num_workers=n,
            fingerprint=fingerprint,
        )
        for n in (0, 2)
    )
    assert_same(together, alone)
    assert together.keys == alone.keys
    assert together.provenance == alone.provenance


class Stream(IterableDataset):
    def __iter__(self):
        yield from ()


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Stream(), "Stream is an iterable data set"),
        (
            TensorDataset(torch.rand(3, 3, 8, 8), torch.arange(3)),
            r"TensorDataset\[0\] yields a Tensor of dtype torch\.float32",
        ),
        ([], "list has no samples"),
    ],
)
def test_a_data_set_that_has_no_images_by_index_is_refused(dataset, message, tiny_clip):
    with pytest.raises(ValueError, match=message):
        run(dataset, tiny_clip)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_something_else_than_an_image_is_refused_wherever_it_stands(pairs, tiny_clip, num_workers):
    dataset = OnTheFly([*pairs[:7], (torch.zeros(3, 8, 8), 0)], transform=None)
    with pytest.raises(ValueError, match=r"OnTheFly\[7\] yields a Tensor .*but \(PIL image, label\) is needed"):
        run(dataset, tiny_clip, num_workers=num_workers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unreadable": "skip"}, "unreadable is 'skip', but it must be 'raise' or 'drop'"),
        ({"batch_size": 0}, "batch_size is 0, but it must be at least 1"),
        ({"precision": "half"}, "precision is 'half', but it must be one of fp32, amp, amp_bf16"),
    ],
)
def test_an_option_out_of_range_is_refused(pairs, tiny_clip, options, message):
    with pytest.raises(ValueError, match=message):
        run(pairs, tiny_clip, **options)


def test_a_model_without_weights_is_refused(pairs):
    with pytest.raises(ValueError, match="'ViT-B-32' names no weights"):
        run(pairs, "ViT-B-32")


# Labels and class names


def test_labels_of_the_caller_replace_those_of_the_data(pairs, tiny_clip):
    assert run(pairs, tiny_clip, labels=[2, 1, 0] * 4).labels.tolist() == [2, 1, 0] * 4


@pytest.mark.parametrize(
    "labels", [np.arange(12) % 3, (np.arange(12) % 3).astype(np.uint8), torch.arange(12, dtype=torch.int32) % 3]
)
def test_labels_may_be_integers_of_any_kind(pairs, tiny_clip, labels):
    assert run([image for image, _ in pairs], tiny_clip, labels=labels).labels.tolist() == [0, 1, 2] * 4


def test_labels_that_come_with_the_images_are_read_with_them(pairs, tiny_clip):
    assert run(OnTheFly(pairs), tiny_clip).labels.tolist() == [0, 1, 2] * 4


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 3] * 4, r"labels\[2\] is 3, but there are only 3 class names"),
        (
            [0, 1, -1] * 4,
            r"labels\[2\] is -1, but classes are numbered from 0 on \(4 labels lie outside\)\. Drop unlabelled",
        ),
        ([0.0, 1.0, 2.0] * 4, r"labels must be one whole number a sample, shape \(N,\), not float32 of shape \(12,\)"),
        ([True, False] * 6, r"labels must be one whole number a sample, shape \(N,\), not bool of shape \(12,\)"),
        ([[0, 1, 1]] * 12, r"labels must be one whole number a sample, shape \(N,\), not int64 of shape \(12, 3\)"),
        ([[0], [1, 2]] * 6, "labels must be one whole number a sample: "),
        (["cat", "dog", "owl"] * 4, "labels must be one whole number a sample: "),
        ([0, None, 2] * 4, r"Sample 1 has no label\. Pass labels=, one whole number a sample"),
    ],
)
def test_labels_that_are_no_classes_are_refused_before_any_image_is_embedded(pairs, counted, labels, message):
    relabelled = [(image, label) for (image, _), label in zip(pairs, labels, strict=True)]
    for dataset, options in [(pairs, {"labels": labels}), (relabelled, {}), (OnTheFly(relabelled), {})]:
        with pytest.raises(ValueError, match=message):
            counted.during(dataset, **options)
    assert counted.images == 0


def test_labels_and_images_are_equally_many(pairs, tiny_clip):
    with pytest.raises(ValueError, match="There are 9 labels for 12 samples"):
        run(pairs, tiny_clip, labels=[0, 1, 2] * 3)


def test_images_alone_need_labels(pairs, tiny_clip):
    with pytest.raises(ValueError, match=r"Sample 0 has no label\. Pass labels="):
        run([image for image, _ in pairs], tiny_clip)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat", "dog"], r"labels\[2\] is 2, but there are only 2 class names\. Pass one name a class"),
        (["cat", "dog", "cat"], "The class name 'cat' stands twice"),
        ("cat", "class_names must be a sequence of non-empty strings, one a class, not 'cat'"),
        (None, "class_names must be a sequence of non-empty strings, one a class, not None"),
        ([], r"labels\[0\] is 0, but there are only 0 class names"),
    ],
)
def test_class_names_that_do_not_fit_are_refused_before_any_image_is_embedded(pairs, counted, names, message):
    with pytest.raises(ValueError, match=message):
        counted.during(pairs, class_names=names)
    assert counted.images == 0


def test_a_class_without_samples_is_named_in_a_warning(pairs, tiny_clip):
    with pytest.warns(
        UserWarning, match=r"2 of 5 classes have no sample: bee, ant\. Check that class_names are in the"
    ):
        assert run(pairs, tiny_clip, class_names=[*NAMES, "bee", "ant"]).class_names == (*NAMES, "bee", "ant")


# Unreadable images


def damage(folder):
    """Three of the twelve, each in another way."""
    (folder / "cat" / "0001.png").write_bytes(b"no image at all")
    whole = (folder / "dog" / "0000.png").read_bytes()
    (folder / "dog" / "0000.png").write_bytes(whole[: len(whole) // 2])
    (folder / "owl" / "0003.png").write_bytes(b"")
    return [1, 4, 11]


FOLDERS = [ImageFolder, lambda folder: timm.data.create_dataset("", root=str(folder))]


@pytest.mark.parametrize("open_folder", FOLDERS)
@pytest.mark.parametrize("fingerprint", ["auto", "content", "mine"])
def test_all_unreadable_images_are_listed_at_once(folder, tiny_clip, tmp_path, open_folder, fingerprint):
    indices = damage(folder)
    for _ in range(2):  # afresh, and from the cache
        with pytest.raises(UnreadableImages, match="3 of 12 images cannot be decoded") as caught:
            run(open_folder(folder), tiny_clip, cache_dir=tmp_path / "cache", fingerprint=fingerprint)
        assert caught.value.indices == indices
        for place, text in zip(caught.value.names, ["cat/0001.png", "dog/0000.png", "owl/0003.png"], strict=True):
            assert re.match(rf"{text} \(image \d+\): \w+Error, .", place)
            assert place in str(caught.value)


@pytest.mark.parametrize("open_folder", FOLDERS)
def test_unreadable_images_may_be_kept_out(folder, tiny_clip, tmp_path, open_folder):
    whole = run(open_folder(folder), tiny_clip)
    indices = damage(folder)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"3 images cannot be decoded and are never selected: cat/0001\.png"):
            embeddings = run(open_folder(folder), tiny_clip, unreadable="drop", cache_dir=tmp_path / "cache")
        assert (~embeddings.readable).nonzero()[:, 0].tolist() == indices
        assert embeddings.image[indices].eq(0).all()  # and not the next image's, as timm would answer
        assert_close(embeddings.image[embeddings.readable], whole.image[embeddings.readable], rtol=0, atol=0)
        assert embeddings.labels.tolist() == whole.labels.tolist()


def test_a_repaired_image_is_embedded_again(folder, counted, tmp_path, small_shards):
    whole = run(ImageFolder(folder), (counted.model, counted.preprocess, counted.tokenizer), batch_size=4)
    sound = (folder / "cat" / "0001.png").read_bytes()
    (folder / "cat" / "0001.png").write_bytes(b"no image at all")
    with pytest.raises(UnreadableImages):
        counted.during(ImageFolder(folder), cache_dir=tmp_path / "cache")
    (folder / "cat" / "0001.png").write_bytes(sound)
    embeddings, (images, _) = counted.during(ImageFolder(folder), cache_dir=tmp_path / "cache")
    assert images == 4
    assert_same(embeddings, whole)


def test_a_damaged_image_in_a_list_is_listed(pairs, folder, tiny_clip):
    damage(folder)
    dataset = [*pairs[:5], (Image.open(folder / "dog" / "0000.png"), 2)]
    with pytest.raises(UnreadableImages) as caught:
        run(dataset, tiny_clip)
    assert caught.value.indices == [5]
    assert caught.value.names[0].startswith("image 5: ")


def test_unreadable_images_of_a_data_set_that_tells_no_labels_are_listed_too(pairs, folder, tiny_clip):
    damage(folder)

    class Opens(OnTheFly):
        def __getitem__(self, index):
            return Image.open(self.pairs[index]).convert("RGB"), index // 4

    dataset = Opens(sorted(folder.rglob("*.png")))
    with pytest.raises(UnreadableImages, match="pass labels=") as caught:
        run(dataset, tiny_clip)
    assert caught.value.indices == [1, 4, 11]
    with pytest.warns(UserWarning, match="3 images cannot be decoded"):
        embeddings = run(dataset, tiny_clip, labels=torch.arange(12) // 4, unreadable="drop")
    assert embeddings.readable.sum() == 9


def test_a_data_set_of_unreadable_images_alone_is_refused(folder, tiny_clip):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(UnreadableImages, match="12 of 12 images cannot be decoded"):
        run(ImageFolder(folder), tiny_clip, unreadable="drop")


def test_a_fault_of_the_preprocessing_is_not_taken_for_a_damaged_image(pairs, tiny_clip):
    model, preprocess, tokenizer = tiny_clip
    culprit = np.asarray(pairs[6][0])

    def fails_once(image):
        if np.array_equal(np.asarray(image), culprit):
            raise ValueError("a fault of its own")
        return preprocess(image)

    with pytest.raises(ValueError, match=r"^a fault of its own") as caught:
        run(pairs, (model, fails_once, tokenizer), unreadable="drop")
    assert str(caught.value) == "a fault of its own"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e6])
def test_a_feature_that_is_not_finite_is_named(folder, tiny_clip, monkeypatch, value):
    encode_image = tiny_clip[0].encode_image

    def overflow(pixels):
        features = encode_image(pixels)
        features[3, 2] = value  # 1e6 is no float16
        return features

    monkeypatch.setattr(tiny_clip[0], "encode_image", overflow)
    with pytest.raises(ValueError, match=r"The feature of cat/0003\.png \(image 3\) is not finite \(1 such"):
        run(ImageFolder(folder), tiny_clip)


# The cache


def test_a_second_run_takes_everything_from_the_cache(pairs, counted, tmp_path):
    first, taken = counted.during(pairs, cache_dir=tmp_path)
    assert taken == (12, 3)
    second, taken = counted.during(pairs, cache_dir=tmp_path)
    assert taken == (0, 0)
    assert_same(second, first)
    assert second.provenance == first.provenance


def test_the_cache_changes_no_bit(pairs, tiny_clip, tmp_path):
    assert_same(run(pairs, tiny_clip, cache_dir=tmp_path), run(pairs, tiny_clip))


def test_other_labels_cost_nothing_and_other_class_names_only_their_prompts(pairs, counted, tmp_path):
    counted.during(pairs, cache_dir=tmp_path)
    noisy, taken = counted.during(pairs, cache_dir=tmp_path, labels=[1, 2, 0] * 4)
    assert taken == (0, 0)
    assert noisy.labels.tolist() == [1, 2, 0] * 4
    assert counted.during([(image, 0) for image, _ in pairs], cache_dir=tmp_path, class_names=["bee"])[1] == (0, 1)
    assert counted.during(pairs, cache_dir=tmp_path, class_names=["owl", "dog", "cat"])[1] == (0, 3)
    assert counted.during(pairs, cache_dir=tmp_path, templates=["a {}", "the {}"])[1] == (0, 6)
    assert counted.during(pairs, cache_dir=tmp_path)[1] == (0, 0)  # the first are still there


def test_other_batches_and_workers_use_the_same_cache(pairs, counted, tmp_path):
    counted.during(pairs, cache_dir=tmp_path)
    assert counted.during(pairs, cache_dir=tmp_path, batch_size=3, num_workers=1)[1] == (0, 0)


def test_another_model_preprocessing_or_precision_uses_none_of_the_cache(
    pairs, tiny_clip, tiny_clip_of, tmp_path, monkeypatch
):
    run(pairs, tiny_clip, cache_dir=tmp_path)
    tokenizer = tiny_clip[2]
    blurred = open_clip.image_transform(16, is_train=False, interpolation="bilinear")
    for clip, options in [
        (tiny_clip_of(seed=1), {}),
        (tiny_clip_of(quick_gelu=True), {}),
        ((tiny_clip_of()[0], blurred, tokenizer), {}),
        (tiny_clip_of(), {"precision": "amp_bf16"}),
    ]:
        with monkeypatch.context() as patch:
            counted = Counted(clip, patch)
            cached, (images, _) = counted.during(pairs, cache_dir=tmp_path, **options)
            assert images == 12
            assert_same(cached, counted.during(pairs, **options)[0])


def test_an_equal_model_that_is_loaded_again_uses_the_cache(pairs, tiny_clip, tiny_clip_of, tmp_path, monkeypatch):
    run(pairs, tiny_clip, cache_dir=tmp_path)
    assert Counted(tiny_clip_of(), monkeypatch).during(pairs, cache_dir=tmp_path)[1] == (0, 0)


def test_a_changed_file_costs_its_shard(folder, counted, tmp_path, small_shards):
    counted.during(ImageFolder(folder), cache_dir=tmp_path / "cache")
    Image.new("RGB", (50, 50), "red").save(folder / "dog" / "0002.png")
    changed, (images, _) = counted.during(ImageFolder(folder), cache_dir=tmp_path / "cache")
    assert images == 4
    assert_same(changed, counted.during(ImageFolder(folder))[0])


def test_a_renamed_file_costs_its_shard(folder, counted, tmp_path, small_shards):
    counted.during(ImageFolder(folder), cache_dir=tmp_path / "cache")
    (folder / "dog" / "0002.png").rename(folder / "dog" / "0002b.png")
    assert counted.during(ImageFolder(folder), cache_dir=tmp_path / "cache")[1] == (4, 0)


def test_a_folder_that_moved_or_was_touched_costs_nothing(folder, counted, tmp_path):
    counted.during(ImageFolder(folder), cache_dir=tmp_path / "cache")
    folder.rename(tmp_path / "elsewhere")
    os.utime(tmp_path / "elsewhere" / "dog" / "0002.png", (0, 0))
    assert counted.during(ImageFolder(tmp_path / "elsewhere"), cache_dir=tmp_path / "cache")[1] == (0, 0)


@pytest.mark.parametrize("fingerprint", ["auto", "content"])
def test_a_changed_pixel_in_memory_costs_its_shard(images_of, counted, tmp_path, small_shards, fingerprint):
    class Arrays(Dataset):
        def __init__(self):
            self.data = np.stack([np.asarray(image) for image in images_of(12)])
            self.targets = [index // 4 for index in range(12)]
            self.transform = TRAINING

        def __len__(self):
            return 12

        def __getitem__(self, index):
            return self.transform(Image.fromarray(self.data[index])), self.targets[index]

    dataset = Arrays()
    options = {"cache_dir": tmp_path, "fingerprint": fingerprint}
    counted.during(dataset, **options)
    assert counted.during(dataset, **options)[1] == (0, 0)
    dataset.data[6, 3, 3, 0] ^= 1
    if fingerprint == "auto":
        assert counted.during(dataset, **options)[1] == (4, 0)
    else:
        with pytest.warns(UserWarning, match=r"\(rows 4 to 7\) was made from other images\. It is computed again"):
            assert counted.during(dataset, **options)[1] == (4, 0)
    assert counted.during(dataset, **options)[1] == (0, 0)


def test_content_notices_what_the_size_of_a_file_does_not_tell(folder, counted, tmp_path, small_shards):
    for path in folder.rglob("*.png"):
        Image.open(path).save(path.with_suffix(".bmp"))  # uncompressed: all of one size
        path.unlink()
    for fingerprint in ("auto", "content"):
        counted.during(ImageFolder(folder), cache_dir=tmp_path / "cache", fingerprint=fingerprint)
    Image.new("RGB", (20, 24), "red").save(folder / "owl" / "0001.bmp")
    assert counted.during(ImageFolder(folder), cache_dir=tmp_path / "cache")[1] == (0, 0)
    with pytest.warns(UserWarning, match=r"\(rows 8 to 11\) was made from other images"):
        changed, (images, _) = counted.during(ImageFolder(folder), cache_dir=tmp_path / "cache", fingerprint="content")
    assert images == 4
    assert_same(changed, counted.during(ImageFolder(folder))[0])


def test_a_data_set_that_says_nothing_of_its_images_is_looked_at(pairs, counted, tmp_path, small_shards):
    counted.during(OnTheFly(pairs), cache_dir=tmp_path)
    assert counted.during(OnTheFly(pairs), cache_dir=tmp_path)[1] == (0, 0)
    swapped = [pairs[1], pairs[0], *pairs[2:]]
    with pytest.warns(UserWarning, match=r"\(rows 0 to 3\) was made from other images"):
        assert counted.during(OnTheFly(swapped), cache_dir=tmp_path)[1] == (4, 0)


def test_the_provenance_tells_other_inputs_apart(pairs, folder, tiny_clip):
    swapped = [pairs[1], pairs[0], *pairs[2:]]
    for fingerprint in ("auto", "content"):
        inputs = [run(d, tiny_clip, fingerprint=fingerprint).provenance["inputs"] for d in (pairs, pairs, swapped)]
        assert inputs[0] == inputs[1] != inputs[2]


def test_a_users_own_fingerprint_is_taken_at_its_word(pairs, counted, tmp_path, images_of):
    counted.during(pairs, cache_dir=tmp_path, fingerprint="version 1")
    others = [(image, index % 3) for index, image in enumerate(images_of(12, seed=1))]
    assert counted.during(others, cache_dir=tmp_path, fingerprint="version 1")[1] == (0, 0)
    assert counted.during(others, cache_dir=tmp_path, fingerprint="version 2")[1] == (12, 0)
    assert counted.during(others[:9], cache_dir=tmp_path, fingerprint="version 2")[1] == (9, 0)


def test_two_data_sets_share_a_cache_in_peace(pairs, images_of, counted, tmp_path):
    others = [(image, index % 3) for index, image in enumerate(images_of(12, seed=1))]
    first, second = (counted.during(dataset, cache_dir=tmp_path)[0] for dataset in (pairs, others))
    for dataset, expected in ((pairs, first), (others, second)):
        cached, taken = counted.during(dataset, cache_dir=tmp_path)
        assert taken == (0, 0)
        assert_same(cached, expected)


def test_samples_that_were_added_cost_only_the_shards_they_are_in(images_of, counted, tmp_path, small_shards):
    images = [(image, index % 3) for index, image in enumerate(images_of(14))]
    counted.during(images[:10], cache_dir=tmp_path)
    assert counted.during(images, cache_dir=tmp_path)[1] == (6, 0)


def test_an_interrupted_run_goes_on_where_it_stood(pairs, counted, tmp_path, small_shards, monkeypatch):
    expected = counted.during(pairs, batch_size=2)[0]
    encode_image, batches = counted.model.encode_image, []

    def interrupted(pixels):
        batches.append(len(pixels))
        if len(batches) == 6:  # in the middle of the third shard
            raise KeyboardInterrupt
        return encode_image(pixels)

    with monkeypatch.context() as patch:
        patch.setattr(counted.model, "encode_image", interrupted)
        with pytest.raises(KeyboardInterrupt):
            counted.during(pairs, batch_size=2, cache_dir=tmp_path)
    resumed, (images, _) = counted.during(pairs, batch_size=2, cache_dir=tmp_path)
    assert images == 4
    assert_same(resumed, expected)


def test_damaged_shards_and_prompts_are_named_and_computed_again(pairs, counted, tmp_path, small_shards):
    expected = counted.during(pairs, cache_dir=tmp_path)[0]
    for path, cost in [*((path, (4, 0)) for path in tmp_path.glob("*/*.safetensors")), (prompts_in(tmp_path), (0, 3))]:
        whole = path.read_bytes()
        for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
            path.write_bytes(damaged)
            with pytest.warns(UserWarning, match=rf"{re.escape(str(path))} .*\. It is computed again\."):
                again, taken = counted.during(pairs, cache_dir=tmp_path)
            assert taken == cost
            assert_same(again, expected)
            assert path.read_bytes() == whole


def test_prompts_of_another_run_in_the_place_of_ours_are_not_taken(pairs, counted, tmp_path):
    counted.during(pairs, cache_dir=tmp_path / "ours")
    counted.during(pairs, cache_dir=tmp_path / "theirs", templates="the {}")
    prompts_in(tmp_path / "ours").write_bytes(prompts_in(tmp_path / "theirs").read_bytes())
    with pytest.warns(UserWarning, match="belongs to other prompts"):
        assert counted.during(pairs, cache_dir=tmp_path / "ours")[1] == (0, 3)


def prompts_in(folder):
    [path] = folder.glob("prompts-*.safetensors")
    return path


# Embeddings


def make(**changes):
    fields = {
        "image": torch.arange(8.0).reshape(4, 2),
        "text": torch.eye(2),
        "labels": [0, 1, 1, 0],
        "class_names": ["cat", "dog"],
    }
    return Embeddings(**{**fields, **changes})


def test_features_of_ones_own_need_no_more_than_labels_and_names():
    embeddings = make()
    assert len(embeddings) == 4
    assert embeddings.labels.dtype == torch.int64
    assert embeddings.class_names == ("cat", "dog")
    assert embeddings.readable is embeddings.keys is embeddings.image_statistics is embeddings.temperature is None


def test_embeddings_come_back_from_their_file_as_they_were(tmp_path):
    embeddings = make(
        image=torch.randn(4, 2).half(),
        class_names=["größe 🐈", "a\n'b'"],
        keys=["cat/ü (1).jpg", "", "猫/\t.png", os.fsdecode(b"caf\xe9.jpg")],
        image_statistics=torch.rand(4, len(STATISTICS)),
        readable=torch.tensor([True, False, True, True]),
        temperature=0.07,
        provenance={"clip": "ViT-B-32/openai", "prompts": ["größe"], "quick_gelu": None},
    )
    embeddings.save(tmp_path / "new" / "embeddings.safetensors")
    loaded = Embeddings.load(tmp_path / "new" / "embeddings.safetensors")
    assert_same(loaded, embeddings)
    assert loaded.image.dtype == torch.float16
    assert (loaded.class_names, loaded.keys) == (embeddings.class_names, embeddings.keys)
    assert (loaded.temperature, loaded.provenance) == (0.07, embeddings.provenance)


def test_what_is_not_there_stays_away(tmp_path):
    make().save(tmp_path / "a")
    loaded = Embeddings.load(tmp_path / "a")
    assert loaded.readable is loaded.keys is loaded.image_statistics is loaded.temperature is None
    assert loaded.provenance == {}


def test_one_nameless_sample_comes_back(tmp_path):
    make(image=torch.ones(1, 2), labels=[0], class_names=["cat"], text=torch.ones(1, 2), keys=[""]).save(tmp_path / "a")
    assert Embeddings.load(tmp_path / "a").keys == [""]


def test_one_matrix_may_serve_as_images_and_as_prompts(tmp_path):
    rows = torch.eye(2)
    make(image=rows, text=rows, labels=[0, 1]).save(tmp_path / "a")
    assert_close(Embeddings.load(tmp_path / "a").text, rows)


def test_a_truncated_or_another_file_is_refused(tmp_path):
    make().save(tmp_path / "a")
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-1])
    with pytest.raises(ValueError, match="it is truncated"):
        Embeddings.load(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="There is no file"):
        Embeddings.load(tmp_path / "b")


def test_other_labels_keep_the_images():
    embeddings = make(keys=["a", "b", "c", "d"], temperature=0.07, provenance={"clip": "mine"})
    relabelled = embeddings.with_labels([1, 1, 0, 0])
    assert relabelled.labels.tolist() == [1, 1, 0, 0]
    assert relabelled.image is embeddings.image
    assert (relabelled.keys, relabelled.temperature) == (embeddings.keys, 0.07)
    assert relabelled.provenance == embeddings.provenance
    assert embeddings.labels.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("labels", [[0, 1, 2, 0], [0, 1], [0.5, 1.0, 1.0, 0.0]])
def test_other_labels_are_checked_as_well(labels):
    with pytest.raises(ValueError, match="label"):
        make().with_labels(labels)


def test_all_tensors_move_to_a_device():
    embeddings = make(readable=torch.ones(4).bool(), image_statistics=torch.ones(4, 9))
    assert_same(embeddings.to("cpu"), embeddings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": torch.ones(4)}, r"image must be a floating point tensor of shape \(N, D\), not a float32 tensor"),
        ({"image": torch.ones(4, 3)}, "text has dimension 2, but 3 was expected: were two models mixed"),
        ({"image": torch.ones(0, 2), "labels": []}, "There are no samples"),
        (
            {"image": torch.tensor([[0.0, 1.0]] * 3 + [[0.0, torch.nan]])},
            "image holds NaN or infinity in 1 rows, row 3",
        ),
        ({"text": torch.full((2, 2), torch.inf)}, "text holds NaN or infinity in 2 rows, row 0"),
        ({"text": torch.ones(3, 2)}, "There are 3 class prompts for 2 class names"),
        ({"labels": [0, 1, 1]}, "There are 3 labels for 4 samples"),
        ({"labels": [0, 1, 1, 2]}, r"labels\[3\] is 2, but there are only 2 class names"),
        ({"labels": [0, 1, 1, -1]}, r"labels\[3\] is -1, but classes are numbered from 0 on"),
        (
            {"labels": torch.eye(4)[:, :2]},
            r"labels must be one whole number a sample, .* not float32 of shape \(4, 2\)",
        ),
        ({"class_names": ["cat", "cat"]}, "The class name 'cat' stands twice"),
        ({"readable": torch.ones(4)}, r"readable must be a bool tensor of shape \(4,\)"),
        ({"keys": ["a", "b"]}, "keys has 2 rows, but there are 4 samples"),
        ({"image_statistics": torch.ones(3, 9)}, "image_statistics has 3 rows, but there are 4 samples"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_an_empty_class_is_named_in_a_warning():
    with pytest.warns(
        UserWarning, match=r"1 of 3 classes have no sample: owl\. Check that class_names are in the order"
    ):
        make(text=torch.ones(3, 2), class_names=["cat", "dog", "owl"])


def test_of_many_empty_classes_five_are_named():
    names = [f"class {index}" for index in range(9)]
    with pytest.warns(
        UserWarning, match=r"7 of 9 classes have no sample: class 2, class 3, .*, class 6, \.\.\.\. Check"
    ):
        make(text=torch.ones(9, 2), class_names=names)


def test_an_image_that_failed_in_passing_is_tried_again(tmp_path, tiny_clip):
    class Busy(list):
        fails = True

        def __getitem__(self, index):
            if index == 3 and self.fails:
                raise OSError(24, "Too many open files")
            return super().__getitem__(index)

    dataset = Busy((image, 0) for image in make_images(6))
    options = {"class_names": ["cat"], "cache_dir": tmp_path, "fingerprint": "mine", "labels": [0] * 6}
    with pytest.raises(UnreadableImages, match="Too many open files"):
        embed(dataset, tiny_clip, **options)
    dataset.fails = False
    with pytest.warns(UserWarning, match="can be decoded by now"):
        assert embed(dataset, tiny_clip, **options).readable is None


def test_the_data_sets_own_names_in_another_order_are_refused(tmp_path, tiny_clip):
    for name, image in zip(("cat", "dog"), make_images(2), strict=True):
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "0.png")
    folder = ImageFolder(tmp_path)
    with pytest.raises(ValueError, match="another order"):
        embed(folder, tiny_clip, class_names=["dog", "cat"])
    assert embed(folder, tiny_clip, class_names=["a cat", "a dog"]).class_names == ("a cat", "a dog")
