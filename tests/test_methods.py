"""Names of transfer methods."""

import pytest
from student_cases import NAMES

from loopfm_jax.errors import UserError
from loopfm_jax.vm.methods import CHANNELS, Method, find_method


def test_a_method_is_the_sum_of_its_channels():
    assert find_method("base") == Method()
    assert {name: find_method(name) for name in CHANNELS if name != "outcome"} == {
        name: method for name, method in CHANNELS.items() if name != "outcome"
    }
    found = find_method("kd+raw+loopfm+outcome")
    assert (found.heads, found.contents) == (("kd",), ("raw", "loopfm"))
    assert found.side == ("outcome", "age") and found.teacher == "fm"
    assert find_method("kd+self").teacher == "self"
    assert [n for n in NAMES if find_method(n).needs_fm] == ["current"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lopfm", "no channel 'lopfm', did you mean 'loopfm'.*A method is base, or some of kd,"),
        ("kd+", "no channel ''"),
        ("base+kd", "no channel 'base'"),
        ("kd+kd", "opens a channel twice"),
        ("loopfm+self", "opens a channel twice"),
        ("kd+outcome", "reads none; add loopfm or raw"),
    ],
)
def test_names_that_mean_nothing(name, message):
    with pytest.raises(UserError, match=message):
        find_method(name)


def test_a_side_setting_adds_to_every_method_that_reads_histories():
    assert find_method("kd", side=("age",)).side == ()
    assert find_method("loopfm", side=("age",)).side == ("age",)
    assert sorted(find_method("loopfm+outcome", side=("age",)).side) == ["age", "outcome"]
