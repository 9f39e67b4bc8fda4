import math
import os

import pytest

from raysae.apart import apart


def test_it_returns_and_raises_what_the_function_does_from_another_process():
    assert apart(math.sqrt, 4.0) == 2.0
    assert apart(os.getpid) != os.getpid()
    with pytest.raises(ValueError, match="math domain error"):
        apart(math.sqrt, -1.0)


def test_what_the_function_prints_is_no_part_of_the_answer():
    assert apart(print, "words") is None


def test_a_process_that_dies_is_told():
    with pytest.raises(RuntimeError, match="_exit ended with status 3"):
        apart(os._exit, 3)
