"""A sampler that yields the indices of a selection, in an order fixed by (seed, epoch), and its way into any loader."""

import copy
import inspect
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from operator import length_hint
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from selectsampler.distributed import from_rank_zero, has_group, process_count, process_rank
from selectsampler.order import EpochOrder
from selectsampler.selection import Selection
from selectsampler.validation import as_seed, resolve_budget

__all__ = ["SelectSampler", "with_sampler"]

CHUNK = 8192  # indices that become Python integers at once: few enough to stay in the processor's cache


class SelectSampler(DistributedSampler[int]):
    """Yields the samples of a selection, each once an epoch, in an order that follows from (seed, epoch) alone.

    >>> sampler = SelectSampler([2, 3, 5, 7], shuffle=False)
    >>> list(sampler), len(sampler)
    ([2, 3, 5, 7], 4)

    In a loop, call `sampler.set_epoch(epoch)` before each epoch, as with `DistributedSampler`; without it every epoch
    has the same order. It is a `DistributedSampler`, so that trainers that look for one do not shard it a second time.

    Args:
        selection: a `Selection`, or any sequence of unique indices.
        shuffle: False yields ascending indices.
        seed: of the order, from 0; the same on all processes.
        num_replicas: R, the number of processes that share the epoch; with `rank`. Unset, there is one; where more run,
            the first `len` or `iter` stops with an error that names the choice.
        rank: which of them this is.
        drop_last: whether ranks drop the samples that do not divide evenly; else the epoch's first are repeated.
        epoch_size: an epoch of another length: it walks on through the selection, epoch after epoch, and repeats no
            sample before all were seen.

    Raises:
        ValueError: if an argument is out of range, or the selection is empty.
    """

    def __init__(
        self,
        selection: Selection | Sequence[int] | Tensor,
        *,
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
        drop_last: bool = False,
        epoch_size: int | None = None,
    ) -> None:
        if (num_replicas is None) != (rank is None):
            raise ValueError("num_replicas and rank go together: give both, or neither.")
        seed = as_seed(seed)
        if epoch_size is not None and epoch_size < 1:
            raise ValueError(f"epoch_size is {epoch_size}, but an epoch has at least one sample.")
        self.indices_only = not isinstance(selection, Selection)
        self.selection = selection if isinstance(selection, Selection) else _selection_of(selection)
        if len(self.selection) == 0:
            raise ValueError("The selection is empty: there is nothing to sample.")
        self.ranks_given = num_replicas is not None
        self._follows_group = False
        self.epoch_size = epoch_size
        super().__init__(
            range(self._epoch_length()),  # type: ignore[arg-type]
            num_replicas=1 if num_replicas is None else num_replicas,
            rank=0 if rank is None else rank,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
        )
        self._measure()
        self._resume_at = 0
        self._expected: str | None = None  # the fingerprint that a loaded state asks for
        self._replaced: str | None = None  # the fingerprint of the selection before the last update
        self._chunk: Iterator[int] = iter(())
        self._chunk_end = 0
        self._order_cache: tuple[tuple, EpochOrder] | None = None

    @classmethod
    def from_process_group(cls, selection: Selection | Sequence[int] | Tensor, **options: Any) -> "SelectSampler":
        """A sampler that shares each epoch with the other processes, for plain loops, timm and Lightning.

        Ranks come from the process group, or from torchrun's environment before there is one; a group that is made
        later, as by Lightning's own launchers, has the last word. `options` as in the class.
        """
        sampler = cls(selection, num_replicas=process_count(), rank=process_rank(), **options)
        sampler._follows_group = True
        return sampler

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        keep: float | str | None = None,
        *,
        clip: str | Sequence[Any],
        class_names: Sequence[str],
        count: int | None = None,
        labels: Tensor | Sequence[int] | None = None,
        preset: dict[str, dict[str, Any]] | None = None,
        embed: dict[str, Any] | None = None,
        cache_dir: Any = None,
        progress: bool = True,
        seed: int = 0,
        **options: Any,
    ) -> "SelectSampler":
        """Embed, adapt, score, select, and return the sampler of the selection.

        Under torchrun (with a process group) ranks embed their shares, rank 0 selects, and all receive the selection.

        >>> sampler = SelectSampler.from_dataset(
        ...     dataset, keep=0.7, clip="ViT-B-32/openai", class_names=names, cache_dir="cache"
        ... )                                                                            # doctest: +SKIP
        >>> loader = DataLoader(dataset, batch_size=256, sampler=sampler)                # doctest: +SKIP

        Args:
            dataset, clip, class_names, labels, cache_dir: as in `selectsampler.embed`.
            keep: a fraction in (0, 1], or `count`, a number of samples; as in `selectsampler.select`.
            preset: arguments of adapt, score and select: `presets.default` unless given, or `presets.paper`, or your
                own.
            embed: more arguments of `selectsampler.embed`, as `{"num_workers": 8, "unreadable": "drop"}`.
            progress: show bars on a terminal.
            seed: of the adaptation, the selection and the sampler's order.
            options: as in the class.
        """
        from selectsampler import presets
        from selectsampler.adaptation import adapt
        from selectsampler.embeddings import embed as embed_dataset
        from selectsampler.scores import score
        from selectsampler.selection import select

        inspect.signature(cls).bind([0], seed=seed, **options)
        seed = as_seed(seed)
        resolve_budget(keep, count, len(dataset))  # what is wrong fails here, not after an hour of embedding
        steps = presets.checked(presets.default if preset is None else preset)
        arguments = {"class_names": class_names, "labels": labels, "cache_dir": cache_dir, "progress": progress}
        embeddings = embed_dataset(dataset, clip, **arguments, **(embed or {}))

        def make() -> Selection:
            adapted = adapt(embeddings, seed=seed, progress=progress, **steps.get("adapt", {}))
            scores = score(adapted, seed=seed, progress=progress, **steps.get("score", {}))
            return select(scores, keep, count=count, seed=seed, progress=progress, **steps.get("select", {}))

        return cls(from_rank_zero(make, what="the selection"), seed=seed, **options)

    def __len__(self) -> int:
        self._check_ranks()
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        self._check_ranks()
        renewed = self._resume_at == 0 and self._expected == self._replaced  # between epochs: nothing is skipped
        if self._expected not in (None, self.selection.fingerprint) and not renewed:
            raise ValueError(
                f"The state that was loaded belongs to selection {self._expected:.8}, but this sampler holds "
                f"{self.selection.fingerprint:.8}. Install the state's selection with update(), or start a new run."
            )
        self._expected = None
        self._chunk, self._chunk_end = iter(()), 0  # a pass begins: it stands at its start, or where a state put it
        return chain.from_iterable(self._chunks())

    @property
    def yielded(self) -> int:
        """How many samples of the current epoch this rank has yielded, those before a resume included."""
        return max(self._resume_at, self._chunk_end - length_hint(self._chunk))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next `iter` yields; the epoch it already has keeps a restored position."""
        if epoch != self.epoch:
            self._rewind()
            self.epoch = epoch

    def update(self, selection: Selection | Sequence[int] | Tensor, *, allow_resize: bool = False) -> None:
        """Install another selection, from the next `iter` on.

        Raises:
            ValueError: if it is of another length (learning-rate schedules count on it) and resizing is not allowed, or
                of another data set.
        """
        new = selection if isinstance(selection, Selection) else _selection_of(selection)
        if len(new) != len(self.selection) and self.epoch_size is None and not allow_resize:
            raise ValueError(
                f"The new selection has {len(new)} samples, the old one {len(self.selection)}. Schedules count on a "
                "constant epoch: keep the number, set epoch_size, or pass allow_resize=True."
            )
        if isinstance(selection, Selection) and not self.indices_only and new.population != self.selection.population:
            raise ValueError(
                f"The new selection is of {new.population} samples, the old one of {self.selection.population}."
            )
        if len(new) == 0:
            raise ValueError("The selection is empty: there is nothing to sample.")
        complete = self._resume_at == 0 and self.yielded == self.num_samples
        self._replaced, self.selection = self.selection.fingerprint, new
        self._measure()
        if complete:  # and stays so at another length
            self._chunk, self._chunk_end = iter(()), self.num_samples

    def state_dict(self, *, yielded: int | None = None) -> dict[str, Any]:
        """Where the sampler stands; equal on all ranks that stand at the same step.

        After a complete pass it is the start of the next epoch. Loaders with workers read ahead of training: such loops
        pass the number of samples that this rank has trained on in this epoch as `yielded`.
        """
        self._follow_group()
        position = self.yielded if yielded is None else yielded
        restored = yielded is None and self._resume_at > 0  # perhaps of a selection that is yet to come
        if not restored and not 0 <= position <= self.num_samples:
            raise ValueError(f"yielded is {position}, but an epoch has {self.num_samples} samples on this rank.")
        complete = not restored and position == self.num_samples
        return {
            "epoch": self.epoch + complete,
            "yielded": 0 if complete else position,
            "fingerprint": self._expected or self.selection.fingerprint,
            "num_replicas": self.num_replicas,
            **self._order_arguments(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` stood: the next `iter` skips what was yielded.

        A state of another selection is kept until `iter`, which refuses it unless that selection was installed
        meanwhile; one between epochs may have been renewed since.

        Raises:
            ValueError: if the state's order differs (seed, shuffle, drop_last, epoch_size), or the number of processes
                changed so that its position cannot be split among them.
        """
        missing = {"epoch", "yielded", "fingerprint", "num_replicas", *self._order_arguments()} - state.keys()
        if missing:
            raise ValueError(f"This is no state of a SelectSampler: it lacks {', '.join(sorted(missing))}.")
        for name, value in self._order_arguments().items():
            if state[name] != value:
                raise ValueError(
                    f"The state was saved with {name}={state[name]}, but this sampler has {name}={value}: its order "
                    "differs. Make the sampler with the same arguments."
                )
        self._follow_group()
        consumed = state["yielded"] * state["num_replicas"]
        if consumed % self.num_replicas:
            raise ValueError(
                f"{consumed} samples were seen by {state['num_replicas']} processes; {self.num_replicas} cannot share "
                "what is left evenly. Resume with as many processes as before, or from the end of an epoch."
            )
        self._rewind()
        self.epoch = state["epoch"]
        self._resume_at = consumed // self.num_replicas
        self._expected = state["fingerprint"]

    def batch_indices(self, step: int, batch_size: int, *, num_shards: int = 1, shard: int = 0) -> Tensor:
        """The samples of a step of the current epoch, (B,), int64; computed, so that it is right behind any read-ahead.

        Args:
            step: counted from the epoch's start, also after a resume.
            batch_size: of this rank's loader.
            num_shards, shard: where batches are dealt out in turn to several processes, as accelerate does, whose last
                round goes on with the epoch's first samples until every process has a whole batch.

        Raises:
            ValueError: if the epoch has no such step.
        """
        self._follow_group()
        order = self._order()
        if not 0 <= shard < num_shards or not 0 <= step * num_shards * batch_size < len(order):
            raise ValueError(
                f"Step {step} (batches of {batch_size}, shard {shard} of {num_shards}) is not in this epoch."
            )
        start = (step * num_shards + shard) * batch_size
        stop = start + batch_size
        return order[start : stop if num_shards > 1 else min(stop, len(order))].clone()

    def _epoch_length(self) -> int:
        return len(self.selection) if self.epoch_size is None else self.epoch_size

    def _order_arguments(self) -> dict[str, Any]:
        return {"seed": self.seed, "shuffle": self.shuffle, "drop_last": self.drop_last, "epoch_size": self.epoch_size}

    def _measure(self) -> None:
        """Set what DistributedSampler says of its length."""
        length = self._epoch_length()
        self.num_samples = length // self.num_replicas if self.drop_last else -(-length // self.num_replicas)
        self.total_size = self.num_samples * self.num_replicas
        self.dataset = range(length)  # type: ignore[assignment]
        if self.num_samples == 0:
            raise ValueError(f"{length} samples and drop_last=True leave nothing for {self.num_replicas} processes.")

    def _rewind(self) -> None:
        self._resume_at = self._chunk_end = 0
        self._chunk = iter(())

    def _follow_group(self) -> None:
        if not (self._follows_group and has_group()):
            return
        if (process_count(), process_rank()) != (self.num_replicas, self.rank):
            if self._resume_at:
                raise ValueError("The process group was made after the sampler's state was loaded: load it after that.")
            self.num_replicas, self.rank = process_count(), process_rank()
            self._measure()

    def _check_ranks(self) -> None:
        self._follow_group()
        if not self.ranks_given and process_count() > 1:
            raise ValueError(
                f"{process_count()} processes run, and this sampler was not told how to share an epoch among them. Use "
                "SelectSampler.from_process_group(...) in plain loops, timm and Lightning; num_replicas=1, rank=0 with "
                "accelerate and the Hugging Face Trainer, which shard batches themselves."
            )

    def _order(self) -> EpochOrder:
        """This rank's samples of the current epoch."""
        key = (self.epoch, self.selection.fingerprint, self.num_replicas, self.rank)
        if self._order_cache is None or self._order_cache[0] != key:
            self._order_cache = None  # one permutation at a time
            ranks = {"num_replicas": self.num_replicas, "rank": self.rank, "drop_last": self.drop_last}
            order = EpochOrder(
                self.selection.indices,
                self.seed,
                self.epoch,
                shuffle=self.shuffle,
                epoch_size=self.epoch_size,
                **ranks,  # type: ignore[arg-type]
            )
            self._order_cache = key, order
        return self._order_cache[1]

    def _chunks(self) -> Iterator[Iterable[int]]:
        """Iterators over Python integers; a chunk at a time, since a list of all would be eight times the tensor."""
        order = self._order()
        start, self._resume_at = self._resume_at, 0
        for begin in range(start, len(order), CHUNK):
            values = order[begin : min(begin + CHUNK, len(order))].tolist()
            self._chunk, self._chunk_end = iter(values), begin + len(values)
            yield self._chunk


def with_sampler(loader: Any, sampler: SelectSampler) -> Any:
    """A loader like `loader` that draws its samples from `sampler`; everything else is unchanged.

    >>> loader = with_sampler(timm_loader, sampler)      # doctest: +SKIP
    >>> loader.sampler is sampler                        # doctest: +SKIP
    True

    Args:
        loader: a `DataLoader`, torchdata's `StatefulDataLoader`, or timm's `PrefetchLoader` around either, as
            `timm.data.create_loader` makes them; not iterated yet, if its workers persist.
        sampler: takes over `num_replicas` and `rank` of a distributed sampler that it replaces, unless it has its own.

    Raises:
        ValueError: if the loader cannot be rebuilt with another sampler; the text says why.
    """
    inner = getattr(loader, "loader", None)
    if not isinstance(loader, DataLoader) and isinstance(inner, DataLoader):  # timm's PrefetchLoader
        outer = copy.copy(loader)
        outer.loader = with_sampler(inner, sampler)
        return outer
    _check_loader(loader, sampler)
    old = loader.sampler if loader.batch_sampler is None else loader.batch_sampler.sampler
    if type(old).__name__ == "RepeatAugSampler":
        warnings.warn("timm's repeated augmentation goes with its sampler: every sample now stands once.", stacklevel=2)
    if not sampler.ranks_given and hasattr(old, "num_replicas") and getattr(old, "ranks_given", True):
        sampler.num_replicas, sampler.rank, sampler.ranks_given = old.num_replicas, old.rank, True
        sampler._measure()
    return type(loader)(sampler=sampler, **_loader_arguments(loader))


def _selection_of(indices: Sequence[int] | Tensor) -> Selection:
    """A selection of bare indices: nothing is known of the data set but that it reaches as far as they do."""
    given = torch.as_tensor(indices)
    return Selection(given, population=int(given.max()) + 1 if len(given) else 0)


def _loader_arguments(loader: DataLoader) -> dict[str, Any]:
    """The arguments that `loader` was made with, read from its attributes."""
    names = {*inspect.signature(DataLoader.__init__).parameters, *inspect.signature(type(loader).__init__).parameters}
    names -= {"self", "sampler", "batch_sampler", "shuffle", "args", "kwargs"}
    arguments = {name: getattr(loader, name) for name in names if hasattr(loader, name)}
    if loader.batch_sampler is not None:  # where it was passed as batch_sampler=, the loader itself does not know these
        arguments |= {name: getattr(loader.batch_sampler, name) for name in ("batch_size", "drop_last")}
    if not arguments.get("pin_memory_device"):  # deprecated: torch warns where it is passed at all
        arguments.pop("pin_memory_device", None)
    return arguments


def _check_loader(loader: Any, sampler: SelectSampler) -> None:
    if not isinstance(sampler, SelectSampler):
        raise ValueError(f"with_sampler takes SelectSampler(selection), not a {type(sampler).__name__}.")
    if not isinstance(loader, DataLoader):
        raise ValueError(
            f"with_sampler takes a DataLoader or timm's PrefetchLoader around one, not a {type(loader).__name__}."
        )
    if isinstance(loader.dataset, IterableDataset):
        raise ValueError("The loader's data set is iterable: its samples have no indices. Use a map-style data set.")
    if type(loader).__name__ == "MultiEpochsDataLoader":
        raise ValueError(
            "timm's MultiEpochsDataLoader starts the next epoch early, before a selection could change. Make the "
            "loader with use_multi_epochs_loader=False; persistent_workers=True gives the same speed."
        )
    batches = type(loader.batch_sampler)
    usual = batches in (NoneType, BatchSampler) or batches.__module__.startswith("torchdata.")
    if not usual:
        raise ValueError(
            f"The loader's batches come from a {batches.__name__}, in which no sampler can be exchanged (timm's "
            "scheduled sizes, for one). Make the loader without it, with batch_size=."
        )
    if loader.persistent_workers and getattr(loader, "_iterator", None) is not None:
        raise ValueError(
            "The loader was iterated already, and its persistent workers run. Call with_sampler before that."
        )
    population, samples = sampler.selection.population, len(loader.dataset)  # type: ignore[arg-type]
    if population > samples or (population < samples and not sampler.indices_only):
        raise ValueError(f"The selection is of {population} samples, but the loader's data set has {samples}.")
