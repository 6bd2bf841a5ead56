import math

import numpy as np
import pytest

from adaptax.optim import SCHEDULES, schedule


def test_warmup_rises_in_a_line_to_the_peak_then_the_shape_begins():
  rate = schedule("cosine", 2.0, 110, warmup=10, final=0.1)
  np.testing.assert_allclose(
    [rate(step) for step in (0, 4, 9)], [0.2, 1.0, 2.0], rtol=1e-6
  )
  halfway = 0.1 * 2 + 0.9 * 2 * 0.5 * (1 + math.cos(math.pi / 2))
  np.testing.assert_allclose(rate(10), 2.0, rtol=1e-6)
  np.testing.assert_allclose(rate(60), halfway, rtol=1e-6)
  np.testing.assert_allclose(rate(110), 0.2, rtol=1e-6)


def test_linear_and_constant():
  linear = schedule("linear", 1.0, 100)
  np.testing.assert_allclose(
    [linear(0), linear(25), linear(100)], [1, 0.75, 0], atol=1e-6
  )
  assert schedule("constant", 3.0, 100)(77) == 3.0


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_warmup_of_the_whole_run_is_allowed(name):
  rate = schedule(name, 1.0, 5, warmup=5)
  np.testing.assert_allclose(rate(4), 1.0, rtol=1e-6)


@pytest.mark.parametrize("warmup", [-1, 101])
def test_a_warmup_outside_the_run_is_refused(warmup):
  with pytest.raises(ValueError, match=f"warmup {warmup} .* 100 steps"):
    schedule("linear", 1.0, 100, warmup=warmup)


def test_an_unknown_schedule_names_the_nearest():
  with pytest.raises(ValueError, match="cosin.*did you mean cosine"):
    schedule("cosin", 1.0, 100)
