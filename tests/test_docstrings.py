"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil

import numpy as np
import pytest
import torch

import selectsampler

MODULES = [m.name for m in pkgutil.walk_packages(selectsampler.__path__, "selectsampler.") if "__main__" not in m.name]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_are_true(name):
    module = importlib.import_module(name)
    failures, _ = doctest.testmod(module, extraglobs={"torch": torch, "np": np, "ss": selectsampler})
    assert failures == 0
