"""Rows by group: what a stable sort gives, a block at a time."""

import pytest
import torch

import selectsampler.grouping
from selectsampler.grouping import rows_of_groups, sort_by_group


@pytest.mark.parametrize("groups", [1, 5, 300, 70_000])
@pytest.mark.parametrize("block", [1, 7, 2**16])
def test_rows_by_group_are_those_of_a_stable_sort(groups, block, monkeypatch):
    monkeypatch.setattr(selectsampler.grouping, "BLOCK", block)
    labels = torch.randint(groups, (50,), generator=torch.Generator().manual_seed(groups))
    order, counts = sort_by_group(labels)
    assert torch.equal(order.long(), labels.argsort(stable=True))
    assert torch.equal(counts, labels.bincount())


def test_groups_without_rows_are_left_out_and_rows_ascend():
    found = [(group, rows.tolist()) for group, rows in rows_of_groups(torch.tensor([4, 1, 4, 4, 1]))]
    assert found == [(1, [1, 4]), (4, [0, 2, 3])]


def test_no_rows_are_no_groups():
    assert list(rows_of_groups(torch.empty(0, dtype=torch.int64))) == []
