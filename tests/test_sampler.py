"""SelectSampler: orders, shards, epochs and positions, stated as lists where they are short enough."""

import pickle
from itertools import combinations, islice

import pytest
import torch
from helpers import Numbers, random_embeddings
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

import selectsampler.sampler
from selectsampler import Selection, SelectSampler

PRIMES = [2, 3, 5, 7, 11]


def epochs(sampler: SelectSampler, numbers=range(3)) -> list[list[int]]:
    orders = []
    for epoch in numbers:
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    return orders


# --- order


def test_an_epoch_holds_every_selected_sample_once():
    sampler = SelectSampler(Selection(PRIMES, population=20))
    assert len(sampler) == 5
    for order in epochs(sampler):
        assert sorted(order) == PRIMES
        assert all(type(index) is int for index in order)


def test_without_shuffling_indices_ascend():
    assert list(SelectSampler([11, 2, 7, 3, 5], shuffle=False)) == PRIMES


def test_the_order_follows_from_seed_and_epoch_alone():
    numbers = range(50)
    assert epochs(SelectSampler(numbers, seed=3)) == epochs(SelectSampler(numbers, seed=3))
    assert epochs(SelectSampler(numbers, seed=3), [2]) == epochs(SelectSampler(numbers, seed=3))[2:]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(SelectSampler(numbers))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_second_pass_without_set_epoch_has_the_same_order():
    sampler = SelectSampler(range(50))
    assert list(sampler) == list(sampler)


def test_no_two_pairs_of_seed_and_epoch_share_an_order():
    orders = [order for seed in range(6) for order in epochs(SelectSampler(range(50), seed=seed), range(6))]
    assert all(a != b for a, b in combinations(orders, 2))


# --- ranks


@pytest.mark.parametrize(
    ("samples", "drop_last", "shards"),
    [
        ([2, 3, 5, 7], False, [[2, 5], [3, 7]]),
        ([2, 3, 5, 7], True, [[2, 5], [3, 7]]),
        (PRIMES, False, [[2, 5, 11], [3, 7, 2]]),  # the first is repeated
        (PRIMES, True, [[2, 5], [3, 7]]),  # the last is dropped
        (PRIMES, False, [[2, 7], [3, 11], [5, 2]]),
        (PRIMES, True, [[2], [3], [5]]),
        ([2, 3], False, [[2], [3], [2], [3], [2]]),  # more ranks than samples
        ([2], False, [[2], [2], [2]]),
    ],
)
def test_ranks_deal_the_samples_out_in_turn_and_evenly(samples, drop_last, shards):
    ranks = range(len(shards))
    samplers = [
        SelectSampler(samples, shuffle=False, num_replicas=len(shards), rank=rank, drop_last=drop_last)
        for rank in ranks
    ]
    assert [list(sampler) for sampler in samplers] == shards
    assert [len(sampler) for sampler in samplers] == [len(shard) for shard in shards]


@settings(max_examples=50, deadline=None)
@given(samples=st.integers(1, 40), replicas=st.integers(1, 9), epoch=st.integers(0, 5), drop_last=st.booleans())
def test_ranks_share_one_shuffled_order(samples, replicas, epoch, drop_last):
    if drop_last and samples < replicas:
        return
    whole = epochs(SelectSampler(range(samples), seed=1), [epoch])[0]
    shards = [
        epochs(SelectSampler(range(samples), seed=1, num_replicas=replicas, rank=r, drop_last=drop_last), [epoch])[0]
        for r in range(replicas)
    ]
    together = [index for step in zip(*shards, strict=True) for index in step]
    even = samples // replicas * replicas if drop_last else -(-samples // replicas) * replicas
    assert together == [whole[i % samples] for i in range(even)]


def test_dropping_what_leaves_a_rank_without_samples_is_refused():
    with pytest.raises(ValueError, match="2 samples and drop_last=True leave nothing for 3 processes"):
        SelectSampler([4, 5], num_replicas=3, rank=0, drop_last=True)


def test_unset_ranks_stop_where_several_processes_run_and_name_the_choice(monkeypatch):
    sampler = SelectSampler(PRIMES)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for use in (len, iter):
        with pytest.raises(ValueError, match=r"2 processes run.*from_process_group\(.*num_replicas=1, rank=0"):
            use(sampler)
    whole = SelectSampler(PRIMES, num_replicas=1, rank=0)
    assert (len(whole), sorted(whole)) == (5, PRIMES)


def test_a_sampler_from_the_process_group_takes_its_ranks_from_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert list(SelectSampler.from_process_group(PRIMES, shuffle=False)) == [3, 7, 2]
    assert list(SelectSampler.from_process_group(PRIMES, shuffle=False, drop_last=True)) == [3, 7]


def test_a_process_group_that_is_made_later_has_the_last_word(monkeypatch):
    sampler, resumed = (SelectSampler.from_process_group(PRIMES, shuffle=False) for _ in range(2))
    resumed.load_state_dict(interrupted(SelectSampler(PRIMES, shuffle=False), 2)[1])
    given = SelectSampler(PRIMES, shuffle=False, num_replicas=1, rank=0)
    for name, answer in (("is_initialized", True), ("get_world_size", 2), ("get_rank", 1)):
        monkeypatch.setattr(torch.distributed, name, lambda answer=answer: answer)
    assert sampler.state_dict()["num_replicas"] == 2
    assert sampler.batch_indices(0, 2).tolist() == [3, 7]
    assert (len(sampler), list(sampler), list(given)) == (3, [3, 7, 2], PRIMES)
    with pytest.raises(ValueError, match="group was made after the sampler's state was loaded"):
        len(resumed)


def test_a_sampler_from_no_process_group_is_the_only_one():
    assert list(SelectSampler.from_process_group(PRIMES, shuffle=False)) == PRIMES


# --- epoch_size


@pytest.mark.parametrize("epoch_size", [1, 3, 5, 7, 12])
def test_epochs_of_another_length_walk_through_the_selection_and_repeat_nothing_before_all_were_seen(epoch_size):
    sampler = SelectSampler(PRIMES, epoch_size=epoch_size)
    orders = epochs(sampler, range(10))
    assert [len(order) for order in orders] == [epoch_size] * 10
    assert len(sampler) == epoch_size
    walk = [index for order in orders for index in order]
    passes = [walk[start : start + 5] for start in range(0, len(walk) - 4, 5)]
    assert all(sorted(one) == PRIMES for one in passes)
    if len(passes) > 4:
        assert len({tuple(one) for one in passes}) > 1


def test_any_epoch_of_a_walk_is_known_without_those_before_it():
    walked = epochs(SelectSampler(PRIMES, epoch_size=3), range(6))
    assert epochs(SelectSampler(PRIMES, epoch_size=3), [5]) == walked[5:]


def test_a_walk_in_ascending_order_starts_over_at_its_end():
    assert epochs(SelectSampler(PRIMES, epoch_size=3, shuffle=False)) == [[2, 3, 5], [7, 11, 2], [3, 5, 7]]


def test_ranks_share_an_epoch_of_another_length():
    shards = [SelectSampler(PRIMES, epoch_size=4, shuffle=False, num_replicas=2, rank=r) for r in (0, 1)]
    assert [epochs(shard, [0, 1]) for shard in shards] == [[[2, 5], [11, 3]], [[3, 7], [2, 5]]]


# --- positions and resuming


def interrupted(sampler: SelectSampler, after: int) -> tuple[list[int], dict]:
    """What was yielded before a run stopped, and the state that it left."""
    stream = iter(sampler)
    head = list(islice(stream, after))
    return head, sampler.state_dict()


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(1, 30),
    replicas=st.integers(1, 4),
    epoch=st.integers(0, 3),
    epoch_size=st.none() | st.integers(1, 40),
    data=st.data(),
)
def test_a_resumed_sampler_yields_exactly_the_rest_of_the_epoch(samples, replicas, epoch, epoch_size, data):
    rank = data.draw(st.integers(0, replicas - 1))
    arguments = {"seed": 7, "num_replicas": replicas, "rank": rank, "epoch_size": epoch_size}
    sampler, resumed = (SelectSampler(range(samples), **arguments) for _ in range(2))
    whole = epochs(sampler, [epoch])[0]
    head, state = interrupted(sampler, data.draw(st.integers(0, len(whole) - 1)))
    assert state["yielded"] == len(head)
    resumed.load_state_dict(pickle.loads(pickle.dumps(state)))
    assert resumed.state_dict() == state
    assert head + list(resumed) == whole
    resumed.set_epoch(epoch + 1)
    assert list(resumed) == epochs(sampler, [epoch + 1])[0]


def test_every_rank_leaves_the_same_state_at_the_same_step():
    samplers = [SelectSampler(range(20), num_replicas=3, rank=rank) for rank in range(3)]
    states = [interrupted(sampler, 4)[1] for sampler in samplers]
    assert states[0] == states[1] == states[2]


@pytest.mark.parametrize("chunk", [1, 3, 4, 12, 100])
def test_the_position_is_right_after_every_sample_and_across_borders_of_chunks(monkeypatch, chunk):
    monkeypatch.setattr(selectsampler.sampler, "CHUNK", chunk)
    sampler = SelectSampler(range(12), seed=1)
    whole = list(SelectSampler(range(12), seed=1))
    stream = iter(sampler)
    assert sampler.yielded == 0
    for position, index in enumerate(stream, start=1):
        assert index == whole[position - 1]
        assert sampler.yielded == position
        resumed = SelectSampler(range(12), seed=1)
        resumed.load_state_dict(sampler.state_dict())
        assert list(resumed) == (whole[position:] or epochs(resumed, [1])[0])
    assert sampler.yielded == 12


@pytest.mark.parametrize("chunk", [2, 100])
def test_a_sampler_that_was_resumed_can_be_resumed_again(monkeypatch, chunk):
    monkeypatch.setattr(selectsampler.sampler, "CHUNK", chunk)
    whole = list(SelectSampler(range(12)))
    first, second, third = (SelectSampler(range(12)) for _ in range(3))
    head, state = interrupted(first, 3)
    second.load_state_dict(state)
    middle, state = interrupted(second, 5)
    assert state["yielded"] == 8
    third.load_state_dict(state)
    assert head + middle + list(third) == whole


def test_after_a_complete_pass_the_state_is_the_start_of_the_next_epoch():
    sampler, resumed = SelectSampler(PRIMES), SelectSampler(PRIMES)
    sampler.set_epoch(4)
    list(sampler)
    state = sampler.state_dict()
    assert (state["epoch"], state["yielded"]) == (5, 0)
    resumed.load_state_dict(state)
    assert resumed.epoch == 5
    assert list(resumed) == epochs(sampler, [5])[0]


def test_a_pass_that_is_begun_anew_stands_at_its_start():
    sampler = SelectSampler(PRIMES)
    interrupted(sampler, 3)
    stream = iter(sampler)
    assert sampler.state_dict()["yielded"] == 0
    next(stream)
    assert sampler.state_dict()["yielded"] == 1
    list(stream)
    iter(sampler)
    assert (sampler.state_dict()["epoch"], sampler.state_dict()["yielded"]) == (0, 0)


def test_a_loop_whose_loader_reads_ahead_says_how_far_training_came():
    sampler, resumed = SelectSampler(range(10)), SelectSampler(range(10))
    whole = list(sampler)  # read to the end, but only four samples were trained on
    state = sampler.state_dict(yielded=4)
    assert (state["epoch"], state["yielded"]) == (0, 4)
    resumed.load_state_dict(state)
    assert list(resumed) == whole[4:]
    assert (
        sampler.state_dict(yielded=10) == sampler.state_dict() == SelectSampler(range(10)).state_dict() | {"epoch": 1}
    )


@pytest.mark.parametrize("yielded", [-1, 11])
def test_a_position_outside_the_epoch_is_refused(yielded):
    with pytest.raises(ValueError, match=f"yielded is {yielded}, but an epoch has 10 samples on this rank"):
        SelectSampler(range(10)).state_dict(yielded=yielded)


def test_set_epoch_with_the_epoch_it_has_keeps_a_restored_position_and_another_discards_it():
    sampler = SelectSampler(range(10))
    sampler.set_epoch(2)
    head, state = interrupted(sampler, 4)
    whole = list(sampler)
    kept, discarded = SelectSampler(range(10)), SelectSampler(range(10))
    kept.load_state_dict(state)
    kept.set_epoch(2)
    assert head + list(kept) == whole
    discarded.load_state_dict(state)
    discarded.set_epoch(1)
    discarded.set_epoch(2)
    assert list(discarded) == whole


def test_an_iterator_that_nobody_advances_costs_no_restored_position():
    sampler, resumed = SelectSampler(range(10)), SelectSampler(range(10))
    head, state = interrupted(sampler, 4)
    resumed.load_state_dict(state)
    iter(resumed)  # as Lightning does before the first epoch
    assert head + list(resumed) == list(sampler)


def test_the_pass_after_a_resumed_one_is_whole():
    sampler, resumed = SelectSampler(range(10)), SelectSampler(range(10))
    _, state = interrupted(sampler, 4)
    resumed.load_state_dict(state)
    assert len(list(resumed)) == 6
    assert list(resumed) == list(sampler)


def test_a_state_of_another_selection_is_refused_by_iter_until_that_selection_is_installed():
    old, new = Selection([1, 2, 3, 4], 10), Selection([5, 6, 7, 8], 10)
    sampler, resumed = SelectSampler(new), SelectSampler(old)
    head, state = interrupted(sampler, 2)
    resumed.load_state_dict(state)
    for _ in range(2):
        message = f"belongs to selection {new.fingerprint[:8]}, but this sampler holds {old.fingerprint[:8]}"
        with pytest.raises(ValueError, match=message):
            iter(resumed)
    resumed.update(new)
    assert head + list(resumed) == list(sampler)


def test_a_state_that_was_taken_up_stands_in_no_later_selections_way():
    sampler, resumed = SelectSampler([1, 2, 3]), SelectSampler([1, 2, 3])
    resumed.load_state_dict(interrupted(sampler, 1)[1])
    list(resumed)
    resumed.update([4, 5, 6])
    assert sorted(resumed) == [4, 5, 6]
    assert resumed.state_dict()["fingerprint"] == resumed.selection.fingerprint


@pytest.mark.parametrize("position", [0, 1, 3, 4])
def test_a_state_that_waits_for_its_selection_is_passed_on_as_it_came(position):
    sampler = SelectSampler([5, 6, 7, 8, 9])
    _, state = interrupted(sampler, position)
    resumed = SelectSampler([1, 2, 3])
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    resumed.update([5, 6, 7, 8, 9], allow_resize=True)
    assert resumed.state_dict() == state


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"shuffle": False}, {"drop_last": True}, {"epoch_size": 4}, {"epoch_size": 10}]
)
def test_a_state_of_another_order_is_refused(change):
    name, value = next(iter(change.items()))
    state = SelectSampler(range(10), **change).state_dict()
    with pytest.raises(ValueError, match=f"saved with {name}={value}, but this sampler has {name}="):
        SelectSampler(range(10)).load_state_dict(state)


def test_a_state_of_something_else_is_refused():
    with pytest.raises(
        ValueError, match="no state of a SelectSampler: it lacks drop_last, epoch, epoch_size, fingerprint"
    ):
        SelectSampler(range(10)).load_state_dict({"yielded": 3})


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4), (4, 2), (3, 2)])
def test_other_processes_go_on_after_the_samples_that_all_have_seen(before, after):
    whole = list(SelectSampler(range(24)))
    samplers = [SelectSampler(range(24), num_replicas=before, rank=rank) for rank in range(before)]
    states = [interrupted(sampler, 4)[1] for sampler in samplers]
    shards = []
    for rank in range(after):
        resumed = SelectSampler(range(24), num_replicas=after, rank=rank)
        resumed.load_state_dict(states[0])
        shards.append(list(resumed))
    together = [index for step in zip(*shards, strict=True) for index in step]
    assert together == whole[4 * before :]


def test_processes_that_cannot_share_what_was_seen_evenly_are_told_how_to_resume():
    _, state = interrupted(SelectSampler(range(24), num_replicas=2, rank=0), 2)
    with pytest.raises(
        ValueError, match=r"4 samples were seen by 2 processes; 3 cannot share what is left evenly.*end of an epoch"
    ):
        SelectSampler(range(24), num_replicas=3, rank=0).load_state_dict(state)


# --- update


def test_an_update_of_the_same_length_takes_effect_with_the_next_pass():
    sampler = SelectSampler([1, 2, 3], shuffle=False)
    stream = iter(sampler)
    next(stream)
    sampler.update([4, 5, 6])
    assert list(stream) == [2, 3]
    assert list(sampler) == [4, 5, 6]
    assert sampler.state_dict()["fingerprint"] == Selection([4, 5, 6], 7).fingerprint


def test_an_update_of_another_length_needs_leave():
    sampler = SelectSampler([1, 2, 3], shuffle=False)
    with pytest.raises(ValueError, match=r"has 2 samples, the old one 3\..* or pass allow_resize=True"):
        sampler.update([4, 5])
    assert list(sampler) == [1, 2, 3]
    sampler.update([4, 5], allow_resize=True)
    assert (len(sampler), list(sampler)) == (2, [4, 5])


def test_with_an_epoch_size_an_update_may_have_any_length():
    sampler = SelectSampler([1, 2, 3], shuffle=False, epoch_size=4)
    sampler.update([4, 5])
    assert (len(sampler), list(sampler)) == (4, [4, 5, 4, 5])


@pytest.mark.parametrize("size", [2, 3, 5])
def test_an_update_after_a_complete_pass_leaves_the_state_at_the_next_epoch(size):
    sampler = SelectSampler([1, 2, 3])
    list(sampler)
    sampler.update(range(size), allow_resize=True)
    state = sampler.state_dict()
    assert (state["epoch"], state["yielded"]) == (1, 0)


def test_an_update_of_another_population_is_refused():
    sampler = SelectSampler(Selection([1, 2], 10))
    with pytest.raises(ValueError, match="new selection is of 20 samples, the old one of 10"):
        sampler.update(Selection([1, 2], 20))


def test_an_update_to_nothing_is_refused():
    with pytest.raises(ValueError, match="selection is empty"):
        SelectSampler([1, 2]).update([], allow_resize=True)


# --- batch_indices


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [False, True])
def test_batch_indices_are_those_of_a_loaders_batches_however_far_it_reads_ahead(workers, drop_last):
    sampler = SelectSampler(range(5, 40), num_replicas=2, rank=1)
    loader = DataLoader(Numbers(40), batch_size=4, sampler=sampler, num_workers=workers, drop_last=drop_last)
    for epoch in (0, 3):
        sampler.set_epoch(epoch)
        steps = 0
        for step, batch in enumerate(loader):
            assert torch.equal(sampler.batch_indices(step, 4), batch)
            steps += 1
        assert steps == len(loader) == (4 if drop_last else 5)


def test_batch_indices_count_from_the_start_of_the_epoch_after_a_resume_too():
    sampler, resumed = SelectSampler(range(20)), SelectSampler(range(20))
    batches = [sampler.batch_indices(step, 4).tolist() for step in range(5)]
    _, state = interrupted(sampler, 8)
    resumed.load_state_dict(state)
    assert [resumed.batch_indices(step, 4).tolist() for step in range(5)] == batches
    assert list(resumed) == batches[2] + batches[3] + batches[4]


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_batch_indices_of_a_shard_are_every_so_manieth_batch_as_accelerate_deals_them(shards):
    sampler = SelectSampler(range(24))
    batches = list(BatchSampler(sampler, 4, drop_last=False))
    for shard in range(shards):
        mine = [sampler.batch_indices(s, 4, num_shards=shards, shard=shard).tolist() for s in range(6 // shards)]
        assert mine == batches[shard::shards]


@pytest.mark.parametrize("samples", [1, 7, 16, 18, 21, 24])
@pytest.mark.parametrize("shards", [2, 3])
def test_batch_indices_of_a_shard_go_on_with_the_first_samples_as_accelerate_does(samples, shards):
    accelerate = pytest.importorskip("accelerate.data_loader")
    sampler = SelectSampler(range(samples))
    for shard in range(shards):
        batches = BatchSampler(sampler, 4, drop_last=False)
        dealt = list(accelerate.BatchSamplerShard(batches, shards, shard))
        steps = range(len(dealt))
        assert [sampler.batch_indices(s, 4, num_shards=shards, shard=shard).tolist() for s in steps] == dealt


def test_batch_indices_follow_an_update():
    sampler = SelectSampler([1, 2, 3], shuffle=False)
    sampler.batch_indices(0, 2)
    sampler.update([4, 5, 6])
    assert sampler.batch_indices(0, 2).tolist() == [4, 5]


def test_batch_indices_may_be_changed_without_harm():
    sampler = SelectSampler([1, 2, 3], shuffle=False)
    sampler.batch_indices(0, 3).zero_()
    assert list(sampler) == [1, 2, 3]


@pytest.mark.parametrize(
    ("step", "options"),
    [(-1, {}), (3, {}), (1, {"num_shards": 3, "shard": 2}), (0, {"shard": 1}), (0, {"num_shards": 2, "shard": -1})],
)
def test_a_step_that_is_not_in_the_epoch_is_refused(step, options):
    with pytest.raises(ValueError, match=rf"Step {step} \(batches of 4, .*\) is not in this epoch"):
        SelectSampler(range(12)).batch_indices(step, 4, **options)


# --- what others make of it


def test_a_sampler_that_was_pickled_in_mid_epoch_goes_on_where_it_stood():
    sampler = SelectSampler(range(10), seed=3)
    head, state = interrupted(sampler, 4)
    copied = pickle.loads(pickle.dumps(sampler))
    assert copied.state_dict() == state
    assert list(copied) == list(sampler)
    resumed = SelectSampler(range(10), seed=3)
    resumed.load_state_dict(state)
    assert head + list(resumed) == list(sampler)


def test_trainers_take_it_for_a_distributed_sampler():
    sampler = SelectSampler(PRIMES, num_replicas=2, rank=1)
    assert isinstance(sampler, DistributedSampler)
    assert (sampler.num_replicas, sampler.rank, sampler.num_samples, sampler.total_size) == (2, 1, 3, 6)
    assert len(sampler.dataset) == 5


def test_it_has_no_attribute_that_accelerate_would_fill():
    sampler = SelectSampler(PRIMES)
    list(sampler)
    assert not hasattr(sampler, "generator")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"selection": []}, "selection is empty"),
        ({"selection": Selection([], 10)}, "selection is empty"),
        ({"selection": [1, 2, 1]}, "Index 1 stands more than once"),
        ({"selection": [-1, 2]}, "Index -1 lies outside"),
        ({"num_replicas": 2}, "num_replicas and rank go together"),
        ({"rank": 0}, "num_replicas and rank go together"),
        ({"num_replicas": 2, "rank": 2}, "rank 2"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.5}, r"seed is 1\.5, but it must be a whole number from 0"),
        ({"epoch_size": 0}, "epoch_size is 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SelectSampler(**{"selection": PRIMES} | arguments)


def test_a_sampler_from_a_data_set_selects_step_by_step(monkeypatch):
    embeddings = random_embeddings(samples=40, classes=2)
    monkeypatch.setattr("selectsampler.embeddings.embed", lambda dataset, clip, **arguments: embeddings)
    preset = {"adapt": {"method": "none"}, "select": {"score_weights": {"semantic_alignment": 1.0}, "balance": None}}
    arguments = {"clip": "tiny", "class_names": ["a", "b"], "preset": preset, "seed": 5}
    sampler = SelectSampler.from_dataset(Numbers(40), keep=0.29, shuffle=False, **arguments)
    alignment = selectsampler.score(embeddings)["semantic_alignment"]
    assert list(sampler) == sorted(alignment.argsort(descending=True)[:11].tolist())
    assert (sampler.seed, sampler.selection.provenance["selection"]["score_weights"]) == (
        5,
        {"semantic_alignment": 1.0},
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 1.5}, r"keep is 1\.5"),
        ({"seed": -1}, "seed is -1"),
        ({"preset": "paper"}, "preset is 'paper', but it must be a dict of arguments of adapt, score, select"),
        ({"preset": {"selec": {}}}, "preset names a step 'selec'"),
        ({"preset": {"select": {"wieghts": 1}}}, r"preset gives select\(\) 'wieghts', which it does not take"),
    ],
)
def test_what_makes_no_sense_stops_before_anything_is_embedded(monkeypatch, arguments, message):
    monkeypatch.setattr("selectsampler.embeddings.embed", lambda *_, **__: pytest.fail("this takes an hour"))
    with pytest.raises(ValueError, match=message):
        SelectSampler.from_dataset(Numbers(40), clip="tiny", class_names=["a", "b"], **{"keep": 0.5} | arguments)
