"""The examples in the docstrings run and give what they say."""

import doctest

import pytest

from tomesd.core import matching, partition, token_map
from tomesd.diffusion import settings


# Those whose examples need no model.
@pytest.mark.parametrize("module", [token_map, partition, matching, settings])
def test_every_example_gives_what_its_docstring_says(module, doctest_namespace):
    result = doctest.testmod(module, extraglobs=doctest_namespace)
    assert result.attempted > 0
    assert result.failed == 0
