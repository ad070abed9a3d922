"""with_sampler: any loader with a sampler of ours in place of its own, and nothing else changed."""

import inspect
from functools import partial

import pytest
import torch
from helpers import Numbers, image_folder
from timm.data import ImageDataset, create_loader
from timm.data.loader import PrefetchLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from selectsampler import Selection, SelectSampler, with_sampler
from selectsampler.order import EpochOrder

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata under newer versions of torch

SELECTED = list(range(3, 25))
WORKERS = pytest.mark.parametrize("workers", [0, 2])
KINDS = pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])


def batches(loader) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


def samples(loader) -> list[int]:
    return torch.cat(list(loader)).tolist()


def in_batches(order, size: int) -> list[list[int]]:
    return [batch.tolist() for batch in torch.tensor(list(order)).split(size)]


# --- plain and stateful loaders


@KINDS
@WORKERS
def test_a_loader_yields_the_selected_samples_in_the_samplers_order(kind, workers):
    sampler = SelectSampler(SELECTED, seed=1)
    loader = with_sampler(kind(Numbers(40), batch_size=4, shuffle=True, num_workers=workers), sampler)
    assert type(loader) is kind
    assert loader.sampler is sampler
    assert len(loader) == 6
    for epoch in (0, 5):
        loader.sampler.set_epoch(epoch)
        order = EpochOrder(torch.tensor(SELECTED), seed=1, epoch=epoch)[0 : len(SELECTED)]
        assert batches(loader) == in_batches(order, 4)


@KINDS
def test_persistent_workers_follow_the_epoch_and_an_update(kind):
    sampler = SelectSampler(SELECTED)
    loader = kind(Numbers(40), batch_size=4, num_workers=2, persistent_workers=True)
    loader = with_sampler(loader, sampler)
    first = batches(loader)
    sampler.set_epoch(1)
    assert batches(loader) == in_batches(sampler, 4) != first
    sampler.update(range(22))
    assert sorted(samples(loader)) == list(range(22))


def mark_worker(mark: int, worker: int) -> None:
    """A worker_init_fn, told from others by its mark."""


def collate_tuple(samples: list[int]) -> tuple[int, ...]:
    return tuple(samples)


@KINDS
def test_every_other_argument_stays_as_it_was(kind):
    arguments = {
        "batch_size": 3,
        "num_workers": 2,
        "collate_fn": collate_tuple,
        "pin_memory": True,
        "drop_last": True,
        "timeout": 60,
        "worker_init_fn": partial(mark_worker, 7),
        "generator": torch.Generator(),
        "prefetch_factor": 5,
        "persistent_workers": True,
    }
    if "in_order" in inspect.signature(kind).parameters:  # from torch 2.6 on
        arguments["in_order"] = False
    if kind is StatefulDataLoader:
        arguments["snapshot_every_n_steps"] = 4
    dataset = Numbers(40)
    old = kind(dataset, shuffle=True, multiprocessing_context="spawn", **arguments)
    loader = with_sampler(old, SelectSampler(SELECTED))
    assert {name: getattr(loader, name) for name in arguments} == arguments
    assert loader.dataset is dataset
    assert loader.multiprocessing_context.get_start_method() == "spawn"
    assert type(old.sampler) is not SelectSampler


def test_a_loader_without_batches_stays_without():
    sampler = SelectSampler(SELECTED)
    loader = with_sampler(DataLoader(Numbers(40), batch_size=None), sampler)
    assert [int(index) for index in loader] == list(sampler)


@KINDS
def test_a_loader_that_was_given_its_batch_sampler_keeps_the_size_of_its_batches(kind):
    old = BatchSampler(SequentialSampler(Numbers(40)), batch_size=5, drop_last=True)
    sampler = SelectSampler(SELECTED)
    loader = with_sampler(kind(Numbers(40), batch_sampler=old), sampler)
    assert batches(loader) == in_batches(sampler, 5)[:4]
    assert (loader.batch_size, loader.drop_last, loader.sampler) == (5, True, sampler)


def test_a_loader_of_another_class_stays_one():
    class OwnLoader(DataLoader):
        pass

    loader = with_sampler(OwnLoader(Numbers(40), batch_size=4), SelectSampler(SELECTED))
    assert type(loader) is OwnLoader


# --- resuming


@WORKERS
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("stopped_after", [0, 2, 4])
def test_a_stateful_loader_resumes_in_mid_epoch(workers, drop_last, stopped_after):
    def make_loader() -> StatefulDataLoader:
        loader = StatefulDataLoader(Numbers(40), batch_size=4, num_workers=workers, drop_last=drop_last)
        return with_sampler(loader, SelectSampler(SELECTED, seed=1))

    whole_run, killed, resumed = make_loader(), make_loader(), make_loader()
    for loader in (whole_run, killed):
        loader.sampler.set_epoch(2)
    whole = batches(whole_run)
    stream = iter(killed)
    head = [next(stream).tolist() for _ in range(stopped_after)]
    resumed.load_state_dict(killed.state_dict())
    resumed.sampler.set_epoch(2)
    assert head + batches(resumed) == whole
    whole_run.sampler.set_epoch(3)
    resumed.sampler.set_epoch(3)
    assert batches(resumed) == batches(whole_run)


@WORKERS
def test_a_stateful_loader_that_was_saved_between_epochs_goes_on_with_the_next(workers):
    def make_loader() -> StatefulDataLoader:
        loader = StatefulDataLoader(Numbers(40), batch_size=4, num_workers=workers)
        return with_sampler(loader, SelectSampler(SELECTED, seed=1))

    whole_run, resumed = make_loader(), make_loader()
    batches(whole_run)
    resumed.load_state_dict(whole_run.state_dict())
    for loader in (whole_run, resumed):
        loader.sampler.set_epoch(1)
    assert batches(resumed) == batches(whole_run)
    assert resumed.sampler.epoch == 1


# --- ranks


def test_the_ranks_of_a_distributed_sampler_are_taken_over():
    old = DistributedSampler(Numbers(40), num_replicas=4, rank=2)
    loader = with_sampler(DataLoader(Numbers(40), batch_size=4, sampler=old), SelectSampler(SELECTED, shuffle=False))
    assert (loader.sampler.num_replicas, loader.sampler.rank) == (4, 2)
    assert samples(loader) == [*SELECTED, 3, 4][2::4]
    assert len(loader) == 2


def test_the_ranks_are_taken_over_from_within_a_batch_sampler_too():
    old = BatchSampler(DistributedSampler(Numbers(40), num_replicas=2, rank=1), batch_size=4, drop_last=False)
    loader = with_sampler(DataLoader(Numbers(40), batch_sampler=old), SelectSampler(SELECTED, shuffle=False))
    assert samples(loader) == SELECTED[1::2]


def test_ranks_of_the_samplers_own_stay():
    old = DistributedSampler(Numbers(40), num_replicas=4, rank=2)
    sampler = SelectSampler(SELECTED, num_replicas=1, rank=0)
    loader = with_sampler(DataLoader(Numbers(40), batch_size=4, sampler=old), sampler)
    assert (loader.sampler.num_replicas, loader.sampler.rank) == (1, 0)


def test_a_sampler_that_was_told_no_ranks_passes_none_on(monkeypatch):
    old = with_sampler(DataLoader(Numbers(40), batch_size=4), SelectSampler(SELECTED))
    loader = with_sampler(old, SelectSampler(SELECTED))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes run"):
        len(loader)


def test_a_timm_loader_for_several_processes_passes_its_ranks_on(monkeypatch, images):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: 1)
    loader = with_sampler(timm_loader(images, distributed=True), SelectSampler(SELECTED, shuffle=False))
    assert (loader.sampler.num_replicas, loader.sampler.rank, len(loader.sampler)) == (2, 1, 11)


# --- refusals


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(40))


class ByLength(BatchSampler):
    """A batch sampler with ideas of its own."""


@pytest.mark.parametrize(
    ("make_loader", "message"),
    [
        (lambda: DataLoader(Stream()), "data set is iterable: its samples have no indices"),
        (lambda: [1, 2, 3], "takes a DataLoader or timm's PrefetchLoader around one, not a list"),
        (lambda: DataLoader(Numbers(24)), "selection is of 25 samples, but the loader's data set has 24"),
        (
            lambda: DataLoader(Numbers(40), batch_sampler=ByLength(range(40), 4, False)),
            "batches come from a ByLength, in which no sampler can be exchanged",
        ),
        (lambda: DataLoader(Numbers(40), batch_sampler=[[1, 2], [3]]), "batches come from a list"),
    ],
)
def test_a_loader_that_cannot_take_a_sampler_is_refused(make_loader, message):
    with pytest.raises(ValueError, match=message):
        with_sampler(make_loader(), SelectSampler(SELECTED))


def test_a_selection_of_another_data_set_is_refused():
    sampler = SelectSampler(Selection(SELECTED, population=30))
    with pytest.raises(ValueError, match="selection is of 30 samples, but the loader's data set has 40"):
        with_sampler(DataLoader(Numbers(40)), sampler)
    assert len(with_sampler(DataLoader(Numbers(30)), sampler)) == 22


def test_a_bare_selection_is_no_sampler():
    with pytest.raises(ValueError, match=r"takes SelectSampler\(selection\), not a Selection"):
        with_sampler(DataLoader(Numbers(40)), Selection(SELECTED, 40))


@KINDS
def test_a_loader_whose_persistent_workers_run_already_is_refused(kind):
    loader = kind(Numbers(40), batch_size=4, num_workers=1, persistent_workers=True)
    next(iter(loader))
    with pytest.raises(ValueError, match=r"iterated already, and its persistent workers run"):
        with_sampler(loader, SelectSampler(SELECTED))


# --- timm


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 40 images, each a class of its own, so that targets tell who is there."""
    return image_folder(tmp_path_factory.mktemp("images"), [1] * 40)


def timm_loader(images, **options):
    arguments = {
        "input_size": (3, 8, 8),
        "batch_size": 4,
        "is_training": True,
        "color_jitter": 0.0,
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "num_workers": 0,
        "persistent_workers": False,
        "device": torch.device("cpu"),
    }
    return create_loader(ImageDataset(str(images)), **arguments | options)


@pytest.mark.parametrize("prefetcher", [True, False])
@WORKERS
def test_a_timm_loader_yields_only_selected_samples_each_once_through_its_own_transforms(images, prefetcher, workers):
    options = {"use_prefetcher": prefetcher, "num_workers": workers, "persistent_workers": workers > 0}
    loader = timm_loader(images, **options)
    sampler = SelectSampler(Selection(SELECTED, population=40))
    loader = with_sampler(loader, sampler)
    assert isinstance(loader, PrefetchLoader if prefetcher else DataLoader)
    assert loader.sampler is sampler
    assert len(loader) == 5  # timm drops the last batch of two
    orders = []
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        pixels, targets = (torch.cat(parts) for parts in zip(*loader, strict=True))
        assert pixels.shape == (20, 3, 8, 8)
        assert pixels.dtype == torch.float32
        # image i is grey throughout, of value 4 i of 255: what crops and flips leave alone
        torch.testing.assert_close(pixels, (4 * targets / 255).float()[:, None, None, None].expand_as(pixels))
        orders.append(targets.tolist())
        assert orders[-1] == list(sampler)[:20]
    assert set(orders[0]) <= set(SELECTED)
    assert len(set(orders[0])) == 20
    assert orders[0] != orders[1]


def test_the_shell_of_a_prefetch_loader_stays_and_the_old_one_is_left_alone(images):
    old = timm_loader(images, re_prob=0.5, img_dtype=torch.float16)
    loader = with_sampler(old, SelectSampler(SELECTED))
    assert loader is not old
    assert old.sampler is not loader.sampler
    assert (loader.random_erasing, loader.img_dtype) == (old.random_erasing, torch.float16)
    assert loader.dataset is old.dataset
    assert loader.loader.collate_fn is old.loader.collate_fn
    assert len(old) == 10


def test_a_prefetch_loader_around_a_stateful_loader_stays_one(images):
    dataset = timm_loader(images, use_prefetcher=False).dataset
    old = PrefetchLoader(StatefulDataLoader(dataset, batch_size=4), device=torch.device("cpu"))
    loader = with_sampler(old, SelectSampler(SELECTED))
    assert type(loader.loader) is StatefulDataLoader
    assert len(loader) == 6


def test_timms_loader_of_many_epochs_is_refused(images):
    loader = timm_loader(images, use_multi_epochs_loader=True)
    with pytest.raises(ValueError, match=r"MultiEpochsDataLoader .* use_multi_epochs_loader=False"):
        with_sampler(loader, SelectSampler(SELECTED))


def test_timms_scheduled_sizes_are_refused(images):
    pytest.importorskip("timm.data.scheduled_sampler")
    loader = timm_loader(images, input_size_choices=[8, 12])
    with pytest.raises(ValueError, match=r"ScheduledBatchSampler, .*scheduled sizes"):
        with_sampler(loader, SelectSampler(SELECTED))


def test_timms_persistent_workers_that_run_already_are_refused(images):
    loader = timm_loader(images, num_workers=1, persistent_workers=True)
    next(iter(loader))
    with pytest.raises(ValueError, match="iterated already"):
        with_sampler(loader, SelectSampler(SELECTED))


def test_a_training_step_may_take_its_weights_by_the_indices_of_the_step():
    selection = Selection(SELECTED, 40, loss_weights=torch.arange(22) / 22)
    sampler = SelectSampler(selection)
    loader = with_sampler(DataLoader(TensorDataset(torch.arange(40)), batch_size=4, num_workers=1), sampler)
    for step, (batch,) in enumerate(loader):
        indices = sampler.batch_indices(step, 4)
        assert torch.equal(indices, batch)
        torch.testing.assert_close(selection.weights_for(indices), (batch - 3) / 22)
