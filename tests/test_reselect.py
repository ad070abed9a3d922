"""A selection is renewed when it is due, by rank 0 for all ranks; losses are those of the right samples."""

import copy
import math
from itertools import pairwise

import pytest
import torch
import torch.multiprocessing as multiprocessing
from helpers import Numbers
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from selectsampler import LossTracker, Reselect, Selection, SelectSampler
from selectsampler.reselect import TrainingState, soft_pruning, trusted_and_hard


def shifted(epoch, state):
    """Ten of a hundred samples, others each epoch."""
    return Selection(torch.arange(10) + 10 * epoch, population=100)


@pytest.fixture
def sampler():
    return SelectSampler(Selection(range(10), population=100), seed=3)


def test_a_selection_is_renewed_at_start_and_every_so_many_epochs(sampler):
    epochs = []
    reselect = Reselect(
        sampler, lambda epoch, state: (epochs.append(epoch), shifted(epoch, state))[1], every=3, start=2
    )
    for epoch in range(9):
        reselect.on_epoch_start(epoch)
        assert sampler.epoch == epoch
    assert epochs == [2, 5, 8]
    assert sorted(sampler) == list(range(80, 90))


def test_without_a_select_fn_the_selection_stays_and_epochs_go_on(sampler):
    reselect = Reselect(sampler)
    reselect.on_epoch_start(4)
    assert sampler.epoch == 4
    assert sorted(sampler) == list(range(10))
    assert reselect.state_dict()["selected_at"] is None


def test_a_selection_of_another_length_is_refused_unless_it_is_allowed(sampler):
    def shrinking(epoch, state):
        return Selection(range(9), population=100)

    with pytest.raises(ValueError, match="constant epoch"):
        Reselect(sampler, shrinking).on_epoch_start(0)
    Reselect(sampler, shrinking, allow_resize=True).on_epoch_start(0)
    assert len(sampler) == 9


def test_a_run_resumed_in_mid_epoch_goes_on_with_the_selection_of_that_epoch(sampler):
    reselect = Reselect(sampler, shifted)
    reselect.on_epoch_start(4)
    stream = iter(sampler)
    head = [next(stream) for _ in range(4)]
    states = copy.deepcopy((sampler.state_dict(), reselect.state_dict()))
    fresh = SelectSampler(Selection(range(10), population=100), seed=3)
    resumed = Reselect(fresh, lambda epoch, state: pytest.fail("selected again in mid-epoch"))
    fresh.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    resumed.on_epoch_start(4)
    assert sorted(head + list(fresh)) == list(range(40, 50))


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata under newer versions of torch
def test_a_run_resumed_between_epochs_goes_on_with_the_next_selection(kind, workers):
    def start() -> tuple[Reselect, DataLoader]:
        sampler = SelectSampler(Selection(range(10), population=100), seed=3)
        return Reselect(sampler, shifted), kind(Numbers(100), 2, sampler=sampler, num_workers=workers)

    def epoch(number: int, reselect: Reselect, loader: DataLoader) -> list[int]:
        reselect.on_epoch_start(number)
        return torch.cat(list(loader)).tolist()

    whole, resumed = start(), start()
    epoch(3, *whole)
    stateful = (lambda run: run[1]) if kind is StatefulDataLoader else (lambda run: run[0].sampler)
    stateful(resumed).load_state_dict(copy.deepcopy(stateful(whole).state_dict()))
    resumed[0].load_state_dict(copy.deepcopy(whole[0].state_dict()))
    assert epoch(4, *resumed) == epoch(4, *whole)


def test_a_state_passes_through_a_checkpoint_that_unpickles_nothing(sampler, tmp_path):
    reselect = Reselect(sampler, shifted, losses=LossTracker(100))
    reselect.on_epoch_start(1)
    torch.save(reselect.state_dict(), tmp_path / "state.pt")
    fresh = Reselect(SelectSampler(Selection(range(10), population=100)), shifted, losses=LossTracker(100))
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert fresh.sampler.selection.fingerprint == sampler.selection.fingerprint


def test_mean_variance_and_forgetting_follow_their_definitions():
    tracker, history = LossTracker(3, momentum=0.8), [0.5, 2.0, 0.1, 0.9, 0.3]
    for loss in history:
        tracker.update(torch.tensor([1]), torch.tensor([loss]))
    mean, variance = history[0], 0.0
    for loss in history[1:]:
        step = loss - mean
        mean, variance = mean + 0.2 * step, 0.8 * (variance + 0.2 * step**2)
    learned = [loss < math.log(2) for loss in history]
    assert tracker.mean[1].item() == pytest.approx(mean)
    assert tracker.variance[1].item() == pytest.approx(variance)
    assert int(tracker.forgotten[1]) == sum(a and not b for a, b in pairwise(learned)) == 2
    assert tracker.mean[[0, 2]].isnan().all()


def test_a_sample_that_padding_shows_twice_counts_once():
    tracker = LossTracker(4)
    tracker.update(torch.tensor([3, 1, 3]), torch.tensor([1.0, 2.0, 9.0]))
    assert tracker.seen.tolist() == [0, 1, 0, 1]
    assert tracker.mean[3] == 1.0


def drawn_alone(trust, losses, *, classes, draws=4000):
    """How often each sample is drawn when one is."""
    state = TrainingState(Selection([0], population=len(trust)), losses)
    select_fn = trusted_and_hard(trust, count=1, classes=classes, seed=3)
    chosen = torch.cat([select_fn(epoch, state).indices for epoch in range(draws)])
    return torch.bincount(chosen, minlength=len(trust)) / draws


def test_trusted_and_hard_samples_are_drawn_in_proportion_to_what_both_judges_say():
    losses, trust, classes = LossTracker(5), [0.9, 0.9, 0.3, 0.02, 0.3], 10
    p = [0.2, 0.9, 0.5, 0.1, 0.1]
    losses.update(torch.arange(4), -torch.tensor(p[:4]).log())  # the last was not seen: at chance
    right = [t * q / (t * q + (1 - t) * (1 - q) / (classes - 1)) for t, q in zip(trust, p, strict=True)]
    assert right[4] == pytest.approx(trust[4])
    expected = torch.tensor([r * (1 - q) for r, q in zip(right, p, strict=True)])
    found = drawn_alone(torch.tensor(trust), losses, classes=classes)
    assert (found - expected / expected.sum()).abs().max() < 0.03  # four standard deviations


def test_a_high_loss_on_a_distrusted_label_is_not_hard():
    losses = LossTracker(300)
    losses.update(torch.arange(300), torch.tensor([6.0, 1.0, 0.01]).repeat_interleave(100))
    trust = torch.tensor([0.02, 0.9, 0.9]).repeat_interleave(100)
    state = TrainingState(Selection([0], population=300), losses)
    chosen = trusted_and_hard(trust, count=100, classes=10)(0, state).indices
    assert len(chosen) == 100
    assert (chosen // 100 == 1).sum() > 90
    again, later = (trusted_and_hard(trust, count=100, classes=10)(epoch, state).indices for epoch in (0, 1))
    assert torch.equal(again, chosen)
    assert not torch.equal(later, chosen)


def test_a_label_that_is_certainly_wrong_comes_last_and_extreme_losses_do_no_harm():
    losses = LossTracker(4)
    losses.update(torch.arange(4), torch.tensor([2.0, 0.0, 1e4, 1.0]))
    state = TrainingState(Selection([0], population=4), losses)
    select_fn = trusted_and_hard(torch.tensor([0.0, 1.0, 1.0, 0.5]), count=1, classes=2)
    assert {int(select_fn(epoch, state).indices) for epoch in range(50)} == {3}


def test_trust_that_is_no_probability_and_a_single_class_are_refused():
    with pytest.raises(ValueError, match="must lie in"):
        trusted_and_hard(torch.tensor([0.5, 1.5]), count=1, classes=10)
    with pytest.raises(ValueError, match="at least two"):
        trusted_and_hard(torch.tensor([0.5, 0.5]), count=1, classes=1)


def test_soft_pruning_keeps_the_expected_gradient():
    losses = LossTracker(200)
    losses.update(torch.arange(200), torch.linspace(0, 2, 200))
    state = TrainingState(Selection(range(200), population=200), losses)
    total = torch.zeros(200)
    for epoch in range(1000):
        selection = soft_pruning(0.5, seed=1)(epoch, state)
        total[selection.indices] += selection.loss_weights
    assert torch.equal(total[100:], torch.full((100,), 1000.0)), "hard samples are never pruned"
    assert (total[:100] / 1000 - 1).abs().max() < 0.13  # four standard deviations


def test_soft_pruning_stays_among_the_samples_it_was_given():
    losses = LossTracker(10)
    losses.update(torch.arange(10), torch.linspace(0, 2, 10))
    state = TrainingState(Selection(range(10), population=10), losses)
    assert set(soft_pruning(0.5, among=torch.tensor([1, 4, 9]))(0, state).indices.tolist()) <= {1, 4, 9}


def two_ranks(rank, rendezvous, answers):
    """One of two gloo processes: each feeds the losses of its own shard, rank 0 selects the highest ten."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    sampler = SelectSampler.from_process_group(Selection(range(100), population=100), seed=1)
    losses = LossTracker(100)
    calls = []

    def highest(epoch, state):
        calls.append(epoch)
        if epoch == 3:
            raise ValueError("not today")
        return Selection(state.losses.mean.nan_to_num(-1).topk(10).indices, population=100)

    reselect = Reselect(sampler, highest, start=1, allow_resize=True, losses=losses)
    reselect.on_epoch_start(0)
    for step in range(5):
        indices = sampler.batch_indices(step, 10)
        losses.update(indices, indices.float() / 100)
    reselect.on_epoch_start(1)
    seen = list(sampler)
    reselect.on_epoch_start(2)
    messages = []
    try:
        reselect.on_epoch_start(3)
    except RuntimeError as error:
        messages.append(str(error))
    if rank == 1:
        sampler.update(Selection(range(10), population=100))
    try:
        reselect.on_epoch_start(4)
    except ValueError as error:
        messages.append(str(error))
    answers.put((rank, calls, seen, losses.seen.tolist(), messages))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_hold_one_selection_and_all_losses(tmp_path):
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    processes = multiprocessing.start_processes(
        two_ranks, (tmp_path / "rendezvous", answers), nprocs=2, join=False, start_method="spawn"
    )
    gathered = sorted(answers.get() for _ in range(2))
    while not processes.join():
        pass
    (_, first_calls, first_seen, first_counts, first_messages), (_, calls, seen, counts, messages) = gathered
    assert first_calls == [1, 2, 3]
    assert calls == [], "only rank 0 selects"
    assert sorted(first_seen + seen) == list(range(90, 100)), "the ten highest losses, wherever they were seen"
    assert first_counts == counts == [1] * 100
    for texts in (first_messages, messages):
        assert "not today" in texts[0]
        assert "disagree" in texts[1]


@pytest.mark.parametrize("made", [[1, 2], None, torch.arange(2)])
def test_a_select_fn_that_returns_no_selection_is_named(made):
    reselect = Reselect(SelectSampler(Selection([1, 2], population=9)), lambda epoch, state: made)
    with pytest.raises(ValueError, match=f"select_fn returned a {type(made).__name__}: return a Selection"):
        reselect.on_epoch_start(0)


def test_a_loss_that_overflowed_is_not_noted():
    losses = LossTracker(4)
    losses.update(torch.tensor([0, 1, 2]), torch.tensor([1.0, torch.inf, torch.nan]))
    assert losses.seen.tolist() == [1, 0, 0, 0]
    assert losses.mean[0] == 1.0


@pytest.mark.parametrize(
    ("indices", "losses", "message"),
    [
        (torch.tensor([0, 4]), torch.ones(2), "Index 4 is not of this data set of 4 samples"),
        (torch.tensor([-1, 2]), torch.ones(2), "Index -1 is not of"),
        (torch.tensor([0, 1]), torch.tensor(0.7), "one loss a sample is needed"),
        ([0, 1], torch.ones(3), r"Losses have shape \(3,\), indices \(2,\)"),
    ],
)
def test_losses_that_are_of_no_sample_are_refused(indices, losses, message):
    with pytest.raises(ValueError, match=message):
        LossTracker(4).update(indices, losses)
