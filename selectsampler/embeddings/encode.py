"""embed(): every image of a data set through a CLIP model once, with a cache that survives a kill at any moment."""

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from selectsampler.distributed import barrier, process_count, process_rank
from selectsampler.embeddings.background import Background
from selectsampler.embeddings.clip import Clip, load_clip
from selectsampler.embeddings.damaging import REVISION, twin_of
from selectsampler.embeddings.datasets import UNREADABLE, Images, NotAnImage, as_images, digest_pixels
from selectsampler.embeddings.features import Embeddings, as_labels
from selectsampler.embeddings.statistics import STATISTICS, statistics_of
from selectsampler.embeddings.throughput import Throughput
from selectsampler.progress import progress_bar
from selectsampler.store import FORMAT, ShardStore, bytes_of, digest_json, digest_tensors, read_tensors, write_tensors
from selectsampler.validation import check_classes, check_labels

__all__ = ["UnreadableImages", "dataset_fingerprint", "embed"]

SHARD = 1024  # images; a kill costs at most these
AHEAD = 3  # batches that are prepared before the model gets to them
ON_CPU = 64  # images that go through the model at once, at most
AT_ONCE = 2**22  # bytes of pixels whose statistics are taken together
NO_TWIN = -1  # where the number of a kind of damage would stand
NO_CONTENT = bytes(32)  # where a digest would stand, had the image been readable

Template = str | Callable[[str], str]
Columns = dict[str, Tensor]
T = TypeVar("T")


class UnreadableImages(ValueError):
    """Some images could not be decoded; `indices` and `names` list them all."""

    def __init__(self, indices: Sequence[int], names: Sequence[str], total: int) -> None:
        self.indices = list(indices)
        self.names = list(names)
        listed = "\n  ".join(self.names)
        super().__init__(
            f"{len(self.names)} of {total} images cannot be decoded. Repair or remove them, or pass "
            f"unreadable='drop' so that they are never selected (nothing is embedded twice with cache_dir):\n  {listed}"
        )


def embed(
    dataset: Any,
    clip: str | Sequence[Any],
    *,
    class_names: Sequence[str],
    templates: Template | Sequence[Template] | None = None,
    labels: Tensor | Sequence[int] | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
    device: str | torch.device = "auto",
    precision: str | None = None,
    cache_dir: Path | str | None = None,
    fingerprint: str = "auto",
    unreadable: str = "raise",
    progress: bool = True,
) -> Embeddings:
    """Embed every image of a data set, and a prompt for each class, with a CLIP model.

    >>> embeddings = embed(dataset, "ViT-B-32/openai", class_names=names, cache_dir="cache")     # doctest: +SKIP

    Images are read as they are stored: the data set's own `transform` is not applied (a shallow copy gets CLIP's
    preprocessing, the data set stays as it is). With `cache_dir`, finished shards of 1,024 images are kept, so that a
    run that was killed goes on, and other labels or class names cost no second pass. Under torchrun each rank embeds
    its share of the shards into `cache_dir`, and all ranks return the whole.

    Args:
        dataset: map-style: torchvision's, timm's `ImageDataset` (folder, tar, `torch/...`, `hfds/...`), a `Subset` or
            `ConcatDataset` of such, a list of (PIL image, label), or any with PIL images and a `transform`.
        clip: `ARCH/TAG` of open_clip, `local-dir:PATH`, `hf-hub:ORG/NAME`, or (model, preprocess, tokenizer); with two
            cores and no GPU two threads call the model at once.
        class_names: C distinct names, in the order of the labels.
        templates: one or several prompts, as `A photo of a {}` (the default) or as functions of the name; the unit
            features of several are averaged.
        labels: N integers; by default the data set's own, read without decoding images where it offers them.
        batch_size: images that go through the model at once; on a CPU at most 64.
        num_workers: processes that decode and preprocess; with 0 this one does it, while the model is at work. On a CPU
            they take cores from the model, and while it is at work torch uses fewer threads in all of this process.
        device: `auto` takes CUDA, then MPS, then the CPU.
        precision: `fp32`, `amp` or `amp_bf16`; by default `amp` on CUDA and `fp32` elsewhere.
        cache_dir: where features are kept. The key is (weights, preprocessing, precision, inputs), never the labels.
        fingerprint: what tells one input from another. `auto`: (name, size) of files, content in memory; `content`: the
            pixels, read again each time; any other string stands for the data set as it is, at your word.
        unreadable: `raise` lists every image that cannot be decoded, `drop` keeps them out of the selection.
        progress: if it takes longer than two seconds, show a bar on a terminal, and at the end print on standard error
            how fast it was and what it was bound by.

    Returns:
        Embeddings with float16 features of the model's own length.

    Raises:
        ValueError: for an iterable data set, one that yields something else than images, labels that do not fit the
            class names, a model without weights, or features that overflow.
        UnreadableImages: (a ValueError) with `unreadable="raise"`, once all images were tried.
    """
    if unreadable not in ("raise", "drop"):
        raise ValueError(f"unreadable is {unreadable!r}, but it must be 'raise' or 'drop'.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but it must be at least 1.")
    images = as_images(dataset)
    label_tensor = _labels(images, labels, progress=progress)
    check_classes(class_names, label_tensor)
    if labels is None:
        _check_order(class_names, images.class_names())
    prompts = _prompts(class_names, templates)
    model = load_clip(clip, device=device, precision=precision)
    options = {"batch_size": batch_size, "num_workers": num_workers, "progress": progress}
    try:
        columns, inputs = _embed_images(images, model, cache_dir, fingerprint, options)
    except NotAnImage as error:
        raise ValueError(str(error)) from None
    readable = _check_readable(images, columns["readable"], unreadable)
    with_twin = (columns["twin"] != NO_TWIN).nonzero()[:, 0]
    return Embeddings(
        image=columns["image"],
        text=_embed_prompts(prompts, model, cache_dir, progress=progress),
        labels=label_tensor,
        class_names=class_names,
        image_statistics=columns["image_statistics"],
        twins=torch.stack([with_twin, columns["twin"][with_twin]], dim=1),
        twin_statistics=columns["twin_statistics"][with_twin],
        readable=readable,
        keys=images.keys(),
        temperature=model.temperature,
        provenance={
            "clip": model.name,
            **model.identity(),
            "fingerprint": fingerprint,
            "inputs": inputs,
            "prompts": prompts[0][:80],
        },
    )


def dataset_fingerprint(images: Images) -> str | None:
    """sha256 over what identifies each image without decoding it, or None where nothing does."""
    identities = images.identities()
    return None if identities is None else digest_json(_shard_inputs(identities))


def _labels(images: Images, given: Tensor | Sequence[int] | None, *, progress: bool) -> Tensor:
    found: Any = given if given is not None else images.labels()
    if found is None:
        found = _labels_by_decoding(images, progress=progress)
    if not isinstance(found, Tensor) and any(label is None for label in found):
        raise ValueError(f"Sample {list(found).index(None)} has no label. Pass labels=, one whole number a sample.")
    labels = as_labels(found)
    check_labels(labels, samples=len(images))
    return labels


def _check_order(class_names: Sequence[str], known: Sequence[str] | None) -> None:
    """The data set's own names in another order are a mistake; other names are the caller's choice."""
    if known is not None and list(class_names) != list(known) and sorted(class_names) == sorted(known):
        label = next(i for i, name in enumerate(known) if class_names[i] != name)
        raise ValueError(
            f"class_names[{label}] is {class_names[label]!r}, but the data set calls class {label} {known[label]!r}: "
            "the names are in another order than the labels."
        )


def _labels_by_decoding(images: Images, *, progress: bool) -> list[Any]:
    found, failures = [], {}
    with progress_bar("labels", len(images), unit="image", show=progress) as bar:
        for index in range(len(images)):
            try:
                found.append(images.label(index))
            except UNREADABLE as error:
                failures[index] = f"{type(error).__name__}, {error} (its label with it, unless you pass labels=)"
            bar.update()
    if failures:
        raise UnreadableImages(list(failures), _named(images, failures), len(images))
    return found


def _prompts(class_names: Sequence[str], templates: Template | Sequence[Template] | None) -> list[list[str]]:
    """The prompts of each class."""
    chosen = ["A photo of a {}"] if templates is None else templates
    chosen = [chosen] if isinstance(chosen, str) or callable(chosen) else list(chosen)
    wrong = [template for template in chosen if not callable(template) and "{}" not in template]
    if wrong or not chosen:
        raise ValueError(f"Templates need a {{}} for the class name: {wrong or 'none was given'}.")
    return [[t(name) if callable(t) else t.replace("{}", name) for t in chosen] for name in class_names]


def _embed_prompts(prompts: list[list[str]], model: Clip, cache_dir: Path | str | None, *, progress: bool) -> Tensor:
    """(C, D), float32: the mean of the unit features of each class's prompts."""
    tokens = model.tokenizer([prompt for of_class in prompts for prompt in of_class])
    key = {"weights": model.weights, "precision": model.precision, "quick_gelu": model.quick_gelu}
    digest = digest_json([key, len(prompts), hashlib.sha256(bytes_of(tokens)).hexdigest()])
    path = None if cache_dir is None else Path(cache_dir) / f"prompts-{digest[:24]}.safetensors"
    if path is not None and path.exists():
        try:
            tensors, metadata = read_tensors(path, kind="prompts")
            if metadata.get("digest") == digest and metadata.get("content") == digest_tensors(tensors):
                return tensors["text"]
            problem = "is damaged or belongs to other prompts"
        except ValueError:
            problem = "is truncated or holds no prompts"
        warnings.warn(f"{path} {problem}. It is computed again.", stacklevel=3)
    features = []
    with progress_bar("prompts", len(tokens), unit="prompt", show=progress) as bar:
        for chunk in tokens.split(256):
            features.append(model.encode_texts(chunk))
            bar.update(len(chunk))
    text = torch.cat(features).unflatten(0, (len(prompts), -1)).mean(dim=1)
    if path is not None:
        identity = {"kind": "prompts", "format": FORMAT, "digest": digest}
        write_tensors(path, {"text": text}, identity | {"content": digest_tensors({"text": text})})
    return text


def _embed_images(
    images: Images, model: Clip, cache_dir: Path | str | None, fingerprint: str, options: dict[str, Any]
) -> tuple[Columns, str]:
    """The columns of all images, and the fingerprint of the inputs."""
    inputs, by_content = _inputs(images, fingerprint)
    prepared = PreparedImages(images, model.preprocess, hash_content=by_content)
    if cache_dir is None:
        if process_count() > 1:
            raise ValueError("Several processes share the work through cache_dir: name a folder that all of them see.")
        columns = _joined(_encode(prepared, model, dict(enumerate(_ranges(images))), None, options))
    else:
        key = {**model.identity(), "statistics": STATISTICS, "twins": REVISION}
        store = ShardStore(cache_dir, key, inputs, rows=len(images), shard_rows=SHARD)
        columns = _fill(store, prepared, model, options)
    if by_content:
        return columns, hashlib.sha256(bytes_of(columns["content"])).hexdigest()
    return columns, digest_json(inputs)


def _fill(store: ShardStore, prepared: "PreparedImages", model: Clip, options: dict[str, Any]) -> Columns:
    """Compute the shards that are missing, each rank every R-th of all, and read the whole."""
    missing = store.missing()
    if prepared.hash_content:
        missing = _distrust_other_content(store, prepared.images, options)
    missing = _distrust_repaired(store, missing, prepared.images)
    own = {shard: store.range(shard) for shard in missing if shard % process_count() == process_rank()}
    _encode(prepared, model, own, store, options)
    barrier()
    return store.read()


def _inputs(images: Images, fingerprint: str) -> tuple[list[str], bool]:
    """What each shard is made from, and whether that is settled by looking at the pixels themselves."""
    ranges = _ranges(images)
    if fingerprint not in ("auto", "content"):
        return [f"{fingerprint} {rows.start}:{rows.stop} of {len(images)}" for rows in ranges], False
    identities = images.identities() if fingerprint == "auto" else None
    if identities is not None:
        return _shard_inputs(identities), False
    keys = images.keys()
    names = [None if keys is None else keys[rows.start : rows.stop] for rows in ranges]
    return [
        f"content of {rows.start}:{rows.stop} of {len(images)} {digest_json(of_rows)}"
        for rows, of_rows in zip(ranges, names, strict=True)
    ], True


def _ranges(images: Images) -> list[range]:
    """The rows of each shard."""
    return [range(start, min(start + SHARD, len(images))) for start in range(0, len(images), SHARD)]


def _shard_inputs(identities: Sequence[str]) -> list[str]:
    return [digest_json(identities[start : start + SHARD]) for start in range(0, len(identities), SHARD)]


def _distrust_repaired(store: ShardStore, missing: list[int], images: Images) -> list[int]:
    """Try again what could not be decoded, as a full table of open files passes; return what is missing then."""
    for shard in set(range(len(store))) - set(missing):
        if shard % process_count() == process_rank():
            failed = (~store.read_shard(shard)["readable"]).nonzero()[:, 0].tolist()
            if any(_content(images, store.range(shard)[row]).any() for row in failed):
                store.distrust(shard, "holds an image that can be decoded by now")
    return store.missing()


def _distrust_other_content(store: ShardStore, images: Images, options: dict[str, Any]) -> list[int]:
    """Look at the pixels behind every cached shard again; the shards that are missing after that."""
    cached = sorted(set(range(len(store))) - set(store.missing()))
    with progress_bar("check", len(cached), unit="shard", show=options["progress"]) as bar:
        for shard in cached:
            content = torch.from_numpy(np.stack([_content(images, index) for index in store.range(shard)]))
            if not torch.equal(content, store.read_shard(shard)["content"]):
                store.distrust(shard, "was made from other images")
            bar.update()
    return store.missing()


def _content(images: Images, index: int) -> np.ndarray:
    try:
        return _as_row(images.content(index))
    except UNREADABLE:
        return _as_row(NO_CONTENT)


def _as_row(digest: bytes) -> np.ndarray:
    return np.array(list(digest), dtype=np.uint8)


class PreparedImages(Dataset):
    """What goes through the model for each image: its pixels, and what is noted of it on the way."""

    def __init__(self, images: Images, preprocess: Callable[[Image.Image], Tensor], *, hash_content: bool) -> None:
        self.images = images
        self.preprocess = preprocess
        self.hash_content = hash_content
        self.blank = torch.zeros_like(preprocess(Image.new("RGB", (64, 64))))

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Columns, float]:
        """A batch, as loaders ask for it, and the seconds it took.

        Many small images are looked at together, of large ones few are held.
        """
        started = perf_counter()
        rows: list[dict[str, Any]] = []
        seen: list[tuple[dict[str, Any], str, np.ndarray]] = []
        waiting = 0
        for index in indices:
            row, of_row = self._prepare(index)
            rows.append(row)
            seen += [(row, name, pixels) for name, pixels in of_row.items()]
            waiting += sum(pixels.size for pixels in of_row.values())
            if waiting > AT_ONCE:
                _note_statistics(seen)
                seen, waiting = [], 0
        _note_statistics(seen)
        return default_collate(rows), perf_counter() - started

    def _prepare(self, index: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """All of a row but its statistics, and the pixels to take them of."""
        try:
            image = self.images.open(index)
        except UNREADABLE:
            image = None
        unseen = np.zeros(len(STATISTICS), dtype=np.float32)
        twin = None if image is None else twin_of(image)
        row = {
            "pixels": self.blank if image is None else self._preprocess(image, index),
            "image_statistics": unseen,
            "readable": image is not None,
            "twin": NO_TWIN if twin is None else twin[0],
            "twin_statistics": unseen,
        }
        if self.hash_content:
            row["content"] = _as_row(NO_CONTENT if image is None else digest_pixels(image))
        seen = {"image_statistics": image, "twin_statistics": None if twin is None else twin[1]}
        return row, {name: np.asarray(of_row) for name, of_row in seen.items() if of_row is not None}

    def _preprocess(self, image: Image.Image, index: int) -> Tensor:
        try:
            return self.preprocess(image)
        except Exception as error:
            if hasattr(error, "add_note"):  # Python 3.11
                error.add_note(f"It was raised by CLIP's preprocess of {_name(self.images.keys(), index)}.")
            raise


def _note_statistics(seen: Sequence[tuple[dict[str, Any], str, np.ndarray]]) -> None:
    for (row, name, _), values in zip(seen, statistics_of([pixels for _, _, pixels in seen]), strict=True):
        row[name] = values


def _encode(
    prepared: PreparedImages, model: Clip, shards: dict[int, range], store: ShardStore | None, options: dict[str, Any]
) -> list[Columns]:
    """Write the columns of each shard, or return them where there is no store.

    While this thread prepares images (no other touches the data set), a second one runs the model and writes; on a CPU
    this one lends it a hand when it is ahead. All share one shard, so that a kill costs no more than that. No batch
    crosses a shard's end, so that a resumed run repeats it exactly.
    """
    stream, images = _batches(prepared, model, shards, options), sum(len(rows) for rows in shards.values())
    done: list[Columns] = []
    throughput = Throughput(images, side_by_side=max(1, options["num_workers"]))
    bar = progress_bar("embed", len(prepared), unit="image", initial=len(prepared) - images, show=options["progress"])

    def encode(batch: Columns) -> Columns:
        with throughput.timing("encode"):
            columns = _encode_batch(batch, model)
        bar.update(len(columns["readable"]))
        return columns

    def finish(shard: int, parts: list[Future[Columns]]) -> None:
        columns = _joined([part.result() for part in parts])
        _check_finite(columns, shards[shard], prepared.images)
        if store is None:
            done.append(columns)
        else:
            with throughput.timing("write"):
                store.write(shard, columns)

    on_cpu, workers = model.device.type == "cpu", options["num_workers"]
    cores = {"elsewhere": max(1, workers), "helps": workers == 0} if on_cpu else {}
    with bar, Background(AHEAD, **cores) as background:
        for shard, rows in shards.items():
            parts = []
            for _ in range(math.ceil(len(rows) / _batch_size(model, options))):
                batch, seconds = next(stream)
                throughput.add("prepare", seconds)
                parts.append(background.submit(encode, batch))
            background.submit(finish, shard, parts)
    if options["progress"]:
        throughput.report()
    return done


def _batch_size(model: Clip, options: dict[str, Any]) -> int:
    """On a CPU fewer images at once: their activations stay in its caches, and the model begins earlier."""
    return min(options["batch_size"], ON_CPU) if model.device.type == "cpu" else options["batch_size"]


def _batches(
    prepared: PreparedImages, model: Clip, shards: dict[int, range], options: dict[str, Any]
) -> Iterator[tuple[Columns, float]]:
    """The prepared batches of all shards in turn, each with the seconds it took."""
    size = _batch_size(model, options)
    batches = [list(rows[start : start + size]) for rows in shards.values() for start in range(0, len(rows), size)]
    if not batches:
        return iter(())
    loader = DataLoader(
        prepared,
        batch_sampler=batches,
        num_workers=options["num_workers"],
        collate_fn=_as_it_is,
        pin_memory=model.device.type == "cuda",
        generator=torch.Generator(),  # else the loader draws from the global one, and a cached run would not
    )
    return iter(loader)


def _as_it_is(batch: T) -> T:
    return batch


def _joined(parts: Sequence[Columns]) -> Columns:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _encode_batch(batch: Columns, model: Clip) -> Columns:
    features = model.encode_images(batch["pixels"])
    features[~batch["readable"]] = 0
    return {"image": features.half(), **{name: column for name, column in batch.items() if name != "pixels"}}


def _check_finite(columns: Columns, rows: range, images: Images) -> None:
    bad = ~torch.isfinite(columns["image"]).all(dim=1)
    if bad.any():
        index = rows[int(bad.nonzero()[0])]
        raise ValueError(
            f"The feature of {_name(images.keys(), index)} is not finite ({int(bad.sum())} such in this shard). Embed "
            "with precision='fp32'; if that does not help, the weights are damaged."
        )


def _check_readable(images: Images, readable: Tensor, unreadable: str) -> Tensor | None:
    """Raise, or return the mask; None where all is well."""
    if readable.all():
        return None
    indices = (~readable).nonzero()[:, 0].tolist()
    names = _named(images, {index: _why(images, index) for index in indices})
    if unreadable == "raise" or len(indices) == len(images):
        raise UnreadableImages(indices, names, len(images))
    warnings.warn(f"{len(names)} images cannot be decoded and are never selected: {'; '.join(names[:5])}", stacklevel=4)
    return readable


def _named(images: Images, problems: Mapping[int, str]) -> list[str]:
    keys = images.keys()
    return [f"{_name(keys, index)}: {problem}" for index, problem in problems.items()]


def _name(keys: Sequence[str] | None, index: int) -> str:
    return f"image {index}" if keys is None else f"{keys[index]} (image {index})"


def _why(images: Images, index: int) -> str:
    try:
        images.open(index)
    except UNREADABLE as error:
        return f"{type(error).__name__}, {error}"
    return "it could not be decoded earlier; delete its shard from the cache to try again"
