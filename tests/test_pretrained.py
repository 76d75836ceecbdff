"""Model folders: what is written comes back bit for bit, in any dtype and sharding; what does not fit is named."""

import dataclasses
import json
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from hi3d_jax import pretrained
from hi3d_jax.models.clip import CLIPVision, CLIPVisionConfig
from hi3d_jax.models.lpips import LPIPS, LPIPSConfig
from hi3d_jax.pretrained import PretrainedError, from_pretrained, parameters, save_pretrained
from hi3d_jax.pretrained.safetensors_files import open_shards, write_shards

TINY = CLIPVisionConfig(
    image_size=28, patch_size=14, width=16, mlp_width=32, num_layers=2, num_heads=2, projection_dim=8
)


@pytest.fixture(scope="module")
def network() -> CLIPVision:
    return CLIPVision(TINY, rngs=nnx.Rngs(0))


@pytest.fixture
def folder(network, tmp_path):
    save_pretrained(tmp_path / "model", {"image_encoder": network}, {"name": "official"})
    return tmp_path / "model"


def bits(network: nnx.Module) -> dict[str, bytes]:
    return {path: np.asarray(value).tobytes() for path, value in parameters(network).items()}


def test_parameters_have_dotted_paths_and_eval_shape_allocates_nothing(network):
    abstract = pretrained.abstract_network(CLIPVision, CLIPVisionConfig.vit_h_14(), param_dtype=jnp.bfloat16)
    specs = parameters(abstract)
    assert all(isinstance(spec, jax.ShapeDtypeStruct) and spec.dtype == jnp.bfloat16 for spec in specs.values())
    assert specs["layers.attention.query.kernel"].shape == (32, 1280, 1280)
    assert specs.keys() == parameters(network).keys()


def test_a_folder_gives_back_the_network_bit_for_bit(network, folder):
    loaded = from_pretrained(folder, "image_encoder")
    assert loaded.config == TINY
    assert bits(loaded) == bits(network)
    assert pretrained.read_config(folder)["recipe"] == {"name": "official"}
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "image_encoder"]
    assert list(load_file(folder / "image_encoder" / "model.safetensors")) == sorted(parameters(network))
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_the_tree_is_ready_for_jit_and_for_training(folder):
    loaded = from_pretrained(folder, "image_encoder")
    graphdef, params, rest = nnx.split(loaded, nnx.Param, ...)
    assert not jax.tree.leaves(rest)
    images = jnp.ones((1, 28, 28, 3))
    gradients = jax.eval_shape(jax.grad(lambda params: nnx.merge(graphdef, params)(images).sum()), params)
    assert jax.tree.structure(gradients) == jax.tree.structure(params)


def output_dtype(network: CLIPVision) -> jnp.dtype:
    return jax.eval_shape(lambda images: network(images), jnp.ones((1, 28, 28, 3))).dtype


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_loading_casts_to_the_chosen_dtype(network, folder, dtype):
    loaded = from_pretrained(folder, "image_encoder", dtype=dtype)
    for path, value in parameters(loaded).items():
        np.testing.assert_array_equal(value, np.asarray(parameters(network)[path]).astype(dtype))
    assert output_dtype(loaded) == dtype
    mixed = from_pretrained(folder, "image_encoder", dtype=dtype, param_dtype=jnp.float32)
    assert bits(mixed) == bits(network)
    assert output_dtype(mixed) == dtype


def test_loading_straight_into_a_sharding(network, folder):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = jax.NamedSharding(mesh, jax.P())

    def sharding(path: str, spec: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
        divides = spec.ndim > 1 and spec.shape[-1] % 8 == 0
        return jax.NamedSharding(mesh, jax.P(*[None] * (spec.ndim - 1), "fsdp")) if divides else whole

    loaded = from_pretrained(folder, "image_encoder", sharding=sharding)
    kernel = parameters(loaded)["layers.attention.query.kernel"]
    assert kernel.sharding.spec == jax.P(None, None, "fsdp")
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 16, 2)}
    assert bits(loaded) == bits(network)
    replicated = from_pretrained(folder, "image_encoder", sharding=whole)
    assert all(value.sharding == whole for value in parameters(replicated).values())


def test_a_large_network_is_written_in_shards(network, tmp_path, monkeypatch):
    monkeypatch.setattr("hi3d_jax.pretrained.safetensors_files.MAX_SHARD_BYTES", 5000)
    save_pretrained(tmp_path / "model", {"image_encoder": network})
    written = tmp_path / "model" / "image_encoder"
    index = json.loads((written / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in written.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert set(index["weight_map"]) == set(parameters(network))
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in parameters(network).values())
    assert bits(from_pretrained(tmp_path / "model", "image_encoder")) == bits(network)
    (written / files[1]).unlink()
    with pytest.raises(PretrainedError, match=rf"{files[1]} cannot be read"):
        from_pretrained(tmp_path / "model", "image_encoder")


def test_several_networks_in_one_folder(network, tmp_path):
    lpips = LPIPS(LPIPSConfig.alex(), rngs=nnx.Rngs(1))
    save_pretrained(tmp_path / "model", {"image_encoder": network, "lpips": lpips})
    assert bits(from_pretrained(tmp_path / "model", "lpips")) == bits(lpips)
    with pytest.raises(PretrainedError, match="no network 'unet'; it has image_encoder, lpips"):
        from_pretrained(tmp_path / "model", "unet")


def rewrite(folder, **changes):
    """Writes the network's weights again with some arrays replaced (None: left out)."""
    path = folder / "image_encoder"
    arrays = {name: np.array(array) for name, array in open_shards(path).items()} | changes
    arrays = {name.replace("/", "."): array for name, array in arrays.items() if array is not None}
    (path / "model.safetensors").unlink()
    write_shards(path, Given(arrays))


@dataclasses.dataclass
class Given:
    """Arrays in memory as `Tensors`."""

    values: dict

    @property
    def specs(self):
        return {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in self.values.items()}

    def arrays(self):
        return iter(self.values.items())


def test_weights_that_do_not_fit_are_one_error_that_names_everything(folder):
    rewrite(
        folder,
        **{
            "pre_norm.scale": None,
            "projection.kernel": np.zeros((8, 16), np.float32),
            "class_embedding": np.zeros(16, np.int64),
            "extra.bias": np.zeros(3, np.float32),
        },
    )
    with pytest.raises(PretrainedError) as caught:
        from_pretrained(folder, "image_encoder")
    assert "4 problem(s)" in str(caught.value)
    for text in (
        "pre_norm.scale is missing",
        "extra.bias belongs to no parameter",
        "projection.kernel has shape (8, 16), the network needs (16, 8)",
        "class_embedding has dtype int64",
    ):
        assert text in str(caught.value)


def edit_config(folder, edit):
    config = json.loads((folder / "config.json").read_text())
    edit(config["networks"]["image_encoder"])
    (folder / "config.json").write_text(json.dumps(config))


BAD_CONFIGS = {
    "an unknown field": (lambda n: n["config"].update(colour=3), "unknown field colour; CLIPVisionConfig has"),
    "a mistyped field": (lambda n: n["config"].update(width="16"), r"config\.width is '16', which is no int"),
    "a truth for a number": (lambda n: n["config"].update(width=True), r"config\.width is True"),
    "a value outside a list": (lambda n: n["config"].update(activation="relu"), r"config\.activation is 'relu'"),
    "sizes that contradict": (lambda n: n["config"].update(num_heads=3), "multiple of"),
    "a size that no weight has": (lambda n: n["config"].update(mlp_width=64), r"fc1\.kernel has shape"),
    "an unknown class": (lambda n: n.update({"class": "ResNet"}), "class 'ResNet' is unknown; there are"),
    "no class": (lambda n: n.pop("class"), "needs a class and a config"),
    "no config": (lambda n: n.pop("config"), "needs a class and a config"),
    "a config that is a list": (lambda n: n.update(config=[]), "must be an object"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_wrong_config_is_refused(folder, case):
    edit, message = BAD_CONFIGS[case]
    edit_config(folder, edit)
    with pytest.raises(ValueError, match=message):
        from_pretrained(folder, "image_encoder")


def test_half_a_folder_is_refused(folder):
    weights = folder / "image_encoder" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    with pytest.raises(PretrainedError, match=r"model\.safetensors cannot be read .*download or write it again"):
        from_pretrained(folder, "image_encoder")
    weights.unlink()
    with pytest.raises(PretrainedError, match=r"model\.safetensors cannot be read"):
        from_pretrained(folder, "image_encoder")
    (folder / "config.json").write_text("{")
    with pytest.raises(PretrainedError, match=r"config\.json cannot be read"):
        from_pretrained(folder, "image_encoder")
    (folder / "config.json").unlink()
    with pytest.raises(PretrainedError, match=r"is .* a model folder"):
        from_pretrained(folder, "image_encoder")


def test_an_index_that_points_elsewhere_is_refused(folder):
    index = folder / "image_encoder" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(PretrainedError, match="strange file names"):
        from_pretrained(folder, "image_encoder")
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    with pytest.raises(PretrainedError, match="promises a"):
        from_pretrained(folder, "image_encoder")


def test_a_failed_or_repeated_write_leaves_what_was_there(network, folder):
    before = bits(from_pretrained(folder, "image_encoder"))
    with pytest.raises(FileExistsError, match="exists already"):
        save_pretrained(folder, {"image_encoder": network})
    specs = {"a": jax.ShapeDtypeStruct((2,), jnp.float32), "b": jax.ShapeDtypeStruct((2,), jnp.float32)}

    class Failing:
        def __init__(self):
            self.specs = specs

        def arrays(self):
            yield "a", np.zeros(2, np.float32)
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        pretrained.write_safetensors(folder.parent / "x.safetensors", Failing())
    with pytest.raises(PretrainedError, match="came where b"):
        pretrained.write_safetensors(folder.parent / "x.safetensors", OneOf(specs, 1))
    with pytest.raises(PretrainedError, match="c came after the last"):
        pretrained.write_safetensors(folder.parent / "x.safetensors", OneOf(specs, 3))
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert bits(from_pretrained(folder, "image_encoder")) == before


@dataclasses.dataclass
class OneOf:
    """Announces `specs` and gives `count` tensors."""

    specs: dict
    count: int

    def arrays(self):
        return ((name, np.zeros(2, np.float32)) for name in "abc"[: self.count])


def test_the_hub(folder, hub_downloads):
    asked = hub_downloads(folder)
    assert from_pretrained("somebody/hi3d", "image_encoder").config == TINY
    assert asked[0] == ("somebody/hi3d", ["config.json"])
    assert asked[-1] == ("somebody/hi3d", ["config.json", "image_encoder/*"])
    for text in ("no-such-folder", "https://example.org/a/b"):
        with pytest.raises(PretrainedError, match="neither a folder nor the id of a repository"):
            from_pretrained(text, "image_encoder")


def test_the_hub_offline(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub, which is not installed").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(PretrainedError, match=r"somebody/hi3d is not a folder, and the .* hub .* pass its path"):
        from_pretrained("somebody/hi3d", "image_encoder")


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = 1


@dataclasses.dataclass(frozen=True)
class Outer:
    required: float
    inner: Inner = Inner()
    pairs: tuple[tuple[int, str], ...] = ()
    fixed: tuple[int, float] = (1, 2.0)
    choice: Literal["a", "b"] | None = None
    flag: bool = False


@pytest.mark.parametrize(
    "config",
    [
        Outer(1.5),
        Outer(2.0, Inner(7), ((1, "x"), (2, "y")), (3, 4.5), "b", True),
    ],
)
def test_configs_survive_json(config):
    fields = json.loads(json.dumps(pretrained.config_to_dict(config)))
    assert pretrained.config_from_dict(Outer, fields) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "lacks the field required of Outer"),
        ({"required": 1, "inner": {"sizes": 2}}, r"config\.inner has the unknown field sizes"),
        ({"required": 1, "pairs": [[1, "x"], [2]]}, r"config\.pairs\[1\] is \[2\]"),
        ({"required": 1, "pairs": [[1, 2]]}, r"config\.pairs\[0\]\[1\] is 2, which is no str"),
        ({"required": None}, r"config\.required is None, which is no float"),
        ({"required": 1, "choice": "c"}, r"config\.choice is 'c'"),
        ({"required": 1, "flag": 1}, r"config\.flag is 1, which is no bool"),
    ],
)
def test_config_fields_are_checked(fields, message):
    with pytest.raises(PretrainedError, match=message):
        pretrained.config_from_dict(Outer, fields)
