"""Under torchrun ranks embed their shares, rank 0 selects, and every rank holds the same selection."""

import pytest
import torch
import torch.multiprocessing as multiprocessing
from helpers import make_images, make_tiny_clip

from selectsampler import Reselect, SelectSampler, embed, score, select
from selectsampler.distributed import barrier, broadcast, check_agreement, gather
from selectsampler.embeddings import encode

NAMES = ["cat", "dog"]


def rank_of_two(rank, folder, answers):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    encode.SHARD = 8  # four shards of thirty images
    model, preprocess, tokenizer = make_tiny_clip()
    encoded = []
    plain = model.encode_image
    model.encode_image = lambda pixels, **options: (encoded.append(len(pixels)), plain(pixels, **options))[1]
    dataset = [(image, number % 2) for number, image in enumerate(make_images(30))]
    sampler = SelectSampler.from_dataset(
        dataset,
        keep=0.5,
        clip=(model, preprocess, tokenizer),
        class_names=NAMES,
        cache_dir=folder / "cache",
        num_replicas=2,
        rank=rank,
    )
    gathered = gather(torch.arange(rank + 1) + 2**40 * rank)
    before = sum(encoded)
    whole_job = Reselect(
        SelectSampler(sampler.selection, num_replicas=2, rank=rank),
        lambda epoch, state: select(score(embed(dataset, (model, preprocess, tokenizer), class_names=NAMES)), count=15),
    )
    whole_job.on_epoch_start(0)
    answers.put((rank, before, sampler.selection.fingerprint, list(sampler), gathered.tolist(), sum(encoded) - before))
    barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_embed_half_each_and_share_one_selection(tmp_path):
    answers = multiprocessing.get_context("spawn").SimpleQueue()
    processes = multiprocessing.start_processes(
        rank_of_two, (tmp_path, answers), nprocs=2, join=False, start_method="spawn"
    )
    first, second = sorted(answers.get() for _ in range(2))
    while not processes.join():
        pass
    assert (first[1], second[1]) == (16, 14)
    assert first[2] == second[2]
    seen = first[3] + second[3]
    assert len(set(seen)) == 15
    assert len(seen) == 16, "the fifteen selected, one of them repeated to be even"
    assert first[4] == second[4] == [0, 2**40, 2**40 + 1], "whole numbers pass unrounded"
    assert (first[5], second[5]) == (30, 0), "a select_fn that embeds does so on rank 0, and waits for nobody"


def test_one_process_talks_to_itself():
    barrier()
    check_agreement("abc", what="nothing")
    assert broadcast("abc") == "abc"
    assert gather(torch.tensor([3, 1])).tolist() == [3, 1]


def test_processes_without_a_group_are_told_to_make_one(monkeypatch, tiny_clip):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="init_process_group"):
        broadcast("abc")
    with pytest.raises(ValueError, match="cache_dir"):
        SelectSampler.from_dataset([(make_images(1)[0], 0)], keep=1.0, clip=tiny_clip, class_names=["cat"])
