"""Tables of rules: strict both ways, one error that lists every problem, and bit-equal round trips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters.rules import (
    ConversionError,
    Rule,
    conv1x1_as_linear,
    conv2d,
    conv3d,
    convert,
    export,
    keep,
    linear,
    plan,
)

RULES = [
    Rule(r"in\.(\d+)\.weight", r"layers.\1.kernel", linear),
    Rule(r"in\.(\d+)\.(bias|gain)", r"layers.\1.\2"),
    Rule(r"attn\.in_proj_weight", ("attn.query.kernel", "attn.key.kernel", "attn.value.kernel"), linear),
    Rule(r"blocks\.(\d+)\.fc\.weight", r"blocks[\1].fc.kernel", linear),
    Rule(r"blocks\.(\d+)\.qkv\.bias", (r"blocks.query[\1]", r"blocks.key[\1]"), keep),
    Rule(r"conv\.weight", "conv.kernel", conv2d),
    Rule(r"time\.weight", "time.kernel", conv3d),
    Rule(r"proj\.weight", "proj.kernel", conv1x1_as_linear),
]
IGNORE = [(r".*num_batches_tracked", "torch's bookkeeping")]


def make_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {
        "in.0.weight": (3, 2),
        "in.0.bias": (3,),
        "in.0.gain": (),
        "in.1.weight": (4, 3),
        "attn.in_proj_weight": (12, 5),
        "blocks.0.fc.weight": (7, 6),
        "blocks.1.fc.weight": (7, 6),
        "blocks.0.qkv.bias": (4,),
        "blocks.1.qkv.bias": (4,),
        "conv.weight": (8, 4, 3, 1),
        "time.weight": (8, 4, 3, 1, 2),
        "proj.weight": (6, 4, 1, 1),
    }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def make_expected() -> dict[str, jax.ShapeDtypeStruct]:
    shapes = {
        "layers.0.kernel": (2, 3),
        "layers.0.bias": (3,),
        "layers.0.gain": (),
        "layers.1.kernel": (3, 4),
        "attn.query.kernel": (5, 4),
        "attn.key.kernel": (5, 4),
        "attn.value.kernel": (5, 4),
        "blocks.fc.kernel": (2, 6, 7),
        "blocks.query": (2, 2),
        "blocks.key": (2, 2),
        "conv.kernel": (3, 1, 4, 8),
        "time.kernel": (3, 1, 2, 4, 8),
        "proj.kernel": (4, 6),
    }
    return {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}


def problems_of(weights, expected=None, rules=RULES, ignore=IGNORE) -> tuple[str, ...]:
    with pytest.raises(ConversionError) as caught:
        plan(weights, expected or make_expected(), rules, ignore)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def test_each_transform_puts_axes_where_ours_are():
    weights = make_weights()
    params = convert(weights, make_expected(), RULES, IGNORE)
    assert list(params) == list(make_expected())
    np.testing.assert_array_equal(params["layers.1.kernel"], weights["in.1.weight"].T)
    np.testing.assert_array_equal(params["attn.key.kernel"], weights["attn.in_proj_weight"][4:8].T)
    np.testing.assert_array_equal(params["blocks.fc.kernel"][1], weights["blocks.1.fc.weight"].T)
    np.testing.assert_array_equal(params["blocks.key"][1], weights["blocks.1.qkv.bias"][2:])
    assert params["conv.kernel"][2, 0, 3, 7] == weights["conv.weight"][7, 3, 2, 0]
    assert params["time.kernel"][2, 0, 1, 3, 7] == weights["time.weight"][7, 3, 2, 0, 1]
    assert params["proj.kernel"][3, 5] == weights["proj.weight"][5, 3, 0, 0]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, jnp.bfloat16])
def test_a_round_trip_is_bit_equal_and_keeps_the_source_dtype(dtype):
    weights = {name: array.astype(dtype) for name, array in make_weights().items()}
    params = convert(weights, make_expected(), RULES, IGNORE)
    assert {array.dtype for array in params.values()} == {np.dtype(dtype)}
    back = export(params, RULES)
    assert back.keys() == weights.keys()
    for name, array in weights.items():
        assert back[name].shape == array.shape
        assert back[name].flags.c_contiguous
        assert back[name].tobytes() == array.tobytes()


def test_dtype_applies_to_floating_parameters_only():
    expected = {"scale": jax.ShapeDtypeStruct((2,), jnp.float32), "steps": jax.ShapeDtypeStruct((1,), jnp.int32)}
    weights = {"scale": np.ones(2, np.float32), "steps": np.ones(1, np.int64)}
    params = convert(weights, expected, [Rule(r"(scale|steps)", r"\1")], dtype=jnp.bfloat16)
    assert (params["scale"].dtype, params["steps"].dtype) == (jnp.bfloat16, np.int64)


def test_one_error_lists_every_problem():
    weights = make_weights()
    weights["unknown.weight"] = np.zeros(1, np.float32)
    weights["in.2.weight"] = np.zeros((3, 3), np.float32)
    weights["in.0.bias"] = np.zeros(4, np.float32)
    weights["conv.weight"] = np.zeros((8, 4), np.float32)
    weights["proj.weight"] = np.zeros((6, 4, 3, 3), np.float32)
    weights["time.weight"] = np.zeros((8, 4, 3, 1, 2), np.int32)
    weights["blocks.2.fc.weight"] = np.zeros((7, 6), np.float32)
    weights["attn.in_proj_weight"] = np.zeros((13, 5), np.float32)
    weights["bn.num_batches_tracked"] = np.zeros((), np.int64)
    del weights["in.1.weight"], weights["blocks.1.qkv.bias"]
    wanted = [
        "unknown.weight: no rule names it",
        "in.2.weight: its target layers.2.kernel is not a parameter",
        "in.0.bias: its shape (4,) becomes (4,), but layers.0.bias needs (3,)",
        "conv.weight: its shape (8, 4) does not suit the transform OIHW -> HWIO",
        "proj.weight: its shape (6, 4, 3, 3) does not suit the transform (out, in, 1, 1) -> (in, out)",
        "time.weight: its dtype int32 does not suit time.kernel",
        "blocks.fc.kernel[2]: no such row, wanted by blocks.2.fc.weight",
        "attn.in_proj_weight: its shape (13, 5) does not suit",
        "layers.1.kernel: never filled",
        "blocks.query[1]: never filled",
        "blocks.key[1]: never filled",
    ]
    problems = problems_of(weights)
    for text in wanted:
        assert any(problem.startswith(text) for problem in problems), f"{text!r} not in {problems}"
    assert len(problems) == len(wanted) + 2  # the fused projection is wrong for each of its three targets


def test_two_rules_for_a_key_two_keys_for_a_target_and_ignored_yet_named():
    expected = {"a": jax.ShapeDtypeStruct((1,), jnp.float32)}
    one = np.zeros(1, np.float32)
    both = [Rule(r"a", "a"), Rule(r"[a-z]", "a")]
    assert problems_of({"a": one}, expected, both)[0] == "a: 2 rules name it, 'a' and '[a-z]'"
    assert problems_of({"a": one, "b": one}, expected, both[1:])[0] == "a: filled 2 times, by a, b"
    assert "both ignored and named" in problems_of({"a": one}, expected, both[:1], [(r"a", "unused")])[0]


def test_mixed_dtypes_in_a_stacked_parameter_are_refused():
    weights = make_weights()
    weights["blocks.1.fc.weight"] = weights["blocks.1.fc.weight"].astype(np.float16)
    assert problems_of(weights) == ("blocks.fc.kernel: its source keys mix the dtypes float16, float32",)


def test_values_that_are_not_finite_are_named_also_when_the_cast_makes_them_so():
    weights = make_weights()
    weights["in.1.weight"][0, 0] = 1e30
    weights["conv.weight"][0, 0, 0, 0] = np.nan
    with pytest.raises(ConversionError) as caught:
        convert(weights, make_expected(), RULES, dtype=np.float16)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["layers.1.kernel", "conv.kernel"]


def test_planning_reads_no_value_and_arrays_come_one_at_a_time():
    class Untouchable(np.ndarray):
        """An array that only says what it is."""

        def __array_finalize__(self, parent):
            assert parent is None or type(parent) is np.ndarray, "a value was looked at"

    weights = {name: array.view(Untouchable) for name, array in make_weights().items()}
    specs = plan(weights, make_expected(), RULES, IGNORE).specs
    assert {path: spec.shape for path, spec in specs.items()} == {p: s.shape for p, s in make_expected().items()}


def test_export_names_what_has_no_source_key():
    params = convert(make_weights(), make_expected(), RULES)
    params["extra.kernel"] = np.zeros(1, np.float32)
    del params["attn.key.kernel"]
    with pytest.raises(ConversionError) as caught:
        export(params, RULES)
    assert caught.value.problems == (
        "extra.kernel: 0 rules give it a source key",
        "attn.in_proj_weight: needs attn.key.kernel, which the network does not have",
    )


@pytest.mark.parametrize("rule", [Rule(r"a.b", "a.b"), Rule(r"a\.(\d+)\.b", "a.b"), Rule(r"(?:x\.)?b", "b")])
def test_a_rule_that_loses_information_cannot_be_read_backwards(rule):
    with pytest.raises(ValueError, match="cannot be read backwards"):
        export({"a.b": np.zeros(1, np.float32)}, [rule])
