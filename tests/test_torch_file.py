"""Checkpoints without torch: what torch wrote is read bit for bit; what a hostile hand wrote is refused, not run."""

import io
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from torch_archives import tensor_pickle, write_zip

from converters import pickle_reader
from converters.torch_file import CheckpointError, open_checkpoint

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="writes real checkpoints with torch, which is not installed")


def state_of_many_kinds(torch) -> dict:
    dtypes = ["float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"]
    state = OrderedDict((f"kind.{name}", torch.arange(12).reshape(3, 4).to(getattr(torch, name))) for name in dtypes)
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state |= {"view.transposed": base.T, "view.slice": base[1:3, ::2], "view.whole": base, "view.last": base[3, 5]}
    state |= {"empty": torch.zeros(0, 5), "scalar": torch.tensor(3.5), "parameter": torch.nn.Parameter(base.clone())}
    return state


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_what_torch_saved_is_read_bit_for_bit(torch, tmp_path, zipped):
    state = state_of_many_kinds(torch)
    torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    reference = torch.load(tmp_path / "x.pt", weights_only=True)
    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        assert list(checkpoint) == list(reference)
        assert checkpoint.notes == ()
        for name, tensor in reference.items():
            array, tensor = checkpoint[name], tensor.detach()
            assert array.shape == tuple(tensor.shape)
            assert str(array.dtype) == str(tensor.dtype).removeprefix("torch.")
            assert array.tobytes() == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert not array.flags.writeable
        assert np.shares_memory(checkpoint["view.whole"], checkpoint["view.transposed"])


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_module_with_metadata_and_buffers(torch, tmp_path, zipped):
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    torch.save(network.state_dict(), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    checkpoint = open_checkpoint(tmp_path / "x.pt")
    assert {"0.weight", "1.running_mean", "1.num_batches_tracked"} <= set(checkpoint)
    np.testing.assert_array_equal(checkpoint["0.weight"], network[0].weight.detach().numpy())


def test_wrappers_are_taken_off_and_reported(torch, tmp_path):
    weight = torch.ones(2)
    torch.save({"module": {"module.a.b": weight, "module.c": weight}}, tmp_path / "deepspeed.pt")
    checkpoint = open_checkpoint(tmp_path / "deepspeed.pt")
    assert list(checkpoint) == ["a.b", "c"]
    assert checkpoint.notes == ("took what is under 'module'", "took the prefix 'module.' off every key")
    lightning = {"epoch": 3, "state_dict": {"a": weight, "n": 7}, "optimizer_states": [], "size": torch.Size([1, 2])}
    torch.save(lightning, tmp_path / "lightning.ckpt")
    checkpoint = open_checkpoint(tmp_path / "lightning.ckpt")
    assert list(checkpoint) == ["a"]
    assert checkpoint.notes == (
        "took what is under 'state_dict' and left out epoch, optimizer_states, size",
        "left out what is no tensor: n",
    )


def test_bookkeeping_of_another_type_is_refused_by_name_or_skipped_on_request(torch, tmp_path):
    from argparse import Namespace

    torch.save({"state_dict": {"a": torch.ones(2)}, "hparams": Namespace(lr=0.1)}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"x\.ckpt: it asks for argparse\.Namespace, .* pass its name as inert"):
        open_checkpoint(tmp_path / "x.ckpt")
    assert list(open_checkpoint(tmp_path / "x.ckpt", inert=("argparse.Namespace",))) == ["a"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_plain_pickle_of_nested_numpy_arrays(tmp_path, protocol):
    rng = np.random.default_rng(0)
    tree = {"net": {"kernel": rng.normal(size=(2, 3)).astype(np.float32), "bias": np.arange(3)}, "f": np.ones((2, 2)).T}
    tree["f"] = np.asfortranarray(rng.normal(size=(4, 2)).astype(np.float16))
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps(tree | {"step": np.float32(2)}, protocol=protocol))
    checkpoint = open_checkpoint(tmp_path / "x.ckpt")
    assert list(checkpoint) == ["net.kernel", "net.bias", "f"]
    np.testing.assert_array_equal(checkpoint["net.kernel"], tree["net"]["kernel"])
    np.testing.assert_array_equal(checkpoint["net.bias"], tree["net"]["bias"])
    np.testing.assert_array_equal(checkpoint["f"], tree["f"])
    assert checkpoint["f"].dtype == np.float16


def test_safetensors(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.ones((3,), ml_dtypes.bfloat16)}
    save_file(arrays, tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    for name, array in arrays.items():
        assert checkpoint[name].dtype == array.dtype
        assert checkpoint[name].tobytes() == array.tobytes()
    whole = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=r"x\.safetensors cannot be read"):
        open_checkpoint(tmp_path / "x.safetensors")


def test_a_hand_made_tensor_is_read_and_a_closed_checkpoint_is_not(tmp_path):
    data = np.arange(6, dtype=np.float32)
    checkpoint = open_checkpoint(write_zip(tmp_path / "x.pt", tensor_pickle(), {"0": data.tobytes()}))
    np.testing.assert_array_equal(checkpoint["w"], data.reshape(2, 3))
    checkpoint.close()
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint["w"]


LIES = {
    "more elements than bytes": ({"numel": 1000}, "claims 1000 elements of float32 .4000 bytes., but the file has 24"),
    "fewer elements than bytes": ({"numel": 6, "kind": b"torch\nHalfStorage\n"}, "claims 6 elements of float16"),
    "a shape beyond the storage": ({"shape": (2, 4), "strides": (4, 1)}, "does not fit in its storage '0' of 6"),
    "an offset beyond the storage": ({"offset": 1}, "does not fit"),
    "a stride beyond the storage": ({"strides": (4, 1)}, "does not fit"),
    "a stride of zero": ({"shape": (10**6, 10**6), "strides": (0, 0)}, "does not fit"),
    "a negative stride": ({"strides": (-3, 1)}, "absurd"),
    "a negative offset": ({"offset": -1}, "absurd"),
    "an absurd size": ({"shape": (2**62, 2**62)}, "absurd"),
    "an absurd stride of an axis of one": ({"shape": (1, 6), "strides": (2**100, 1)}, "absurd"),
    "axes without strides": ({"shape": (2, 3, 1)}, "3 axes and 2 strides"),
    "a negative storage": ({"numel": -6}, "no tensor storage"),
    "a storage that is not there": ({"key": "7"}, "lacks the storage '7'"),
    "a storage outside the folder": ({"key": "../data.pkl"}, "lacks the storage"),
    "a storage type that is a function": ({"kind": b"collections\nOrderedDict\n"}, "no tensor storage"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_storage_that_lies_is_refused(tmp_path, lie):
    claims, message = LIES[lie]
    path = write_zip(tmp_path / "x.pt", tensor_pickle(**claims), {"0": bytes(24)})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def shell(tmp_path) -> bytes:
    """A command that would leave a trace."""
    return f"{sys.executable} -c \"open('{tmp_path / 'pwned'}', 'w')\"".encode()


class Reduces:
    """An object whose pickle calls `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks(tmp_path) -> dict[str, tuple[bytes, str]]:
    """Pickles that would write a file, and the name that the refusal must give."""
    command = shell(tmp_path)
    code = f"open({str(tmp_path / 'pwned')!r}, 'w')"
    short = b"U" + bytes([len(command)]) + command
    system, proto = b"cos\nsystem\n", b"\x80\x02"
    unicode = b"\x8c\x02os\x8c\x06system\x93"
    name = "posix.system" if os.name == "posix" else "nt.system"
    return {
        "REDUCE os.system": (pickle.dumps({"a": Reduces(os.system, command.decode())}), name),
        "REDUCE builtins.eval": (pickle.dumps(Reduces(eval, code), protocol=2), "__builtin__.eval"),
        "REDUCE builtins.exec": (pickle.dumps(Reduces(exec, code), protocol=4), "builtins.exec"),
        "nested in a dict in a list": (pickle.dumps({"a": [{"b": (Reduces(eval, code),)}]}), "builtins.eval"),
        "nested in an OrderedDict": (pickle.dumps(OrderedDict(a=Reduces(eval, code))), "builtins.eval"),
        "argument of an allowed call": (
            b"\x80\x02ccollections\nOrderedDict\n(" + system + short + b"\x85RtR.",
            "os.system",
        ),
        "GLOBAL": (proto + system + short + b"\x85R.", "os.system"),
        "STACK_GLOBAL": (b"\x80\x04" + unicode + short + b"\x85R.", "os.system"),
        "STACK_GLOBAL from the memo": (
            b"\x80\x04\x8c\x06system\x94\x8c\x02os\x94h\x01h\x00\x93" + short + b"\x85R.",
            "os.system",
        ),
        "STACK_GLOBAL of a dotted name": (b"\x80\x04\x8c\x08builtins\x8c\x0eobject.__new__\x93.", "object.__new__"),
        "INST": (b"(" + short + b"ios\nsystem\n.", "INST of os.system"),
        "OBJ": (b"(" + system + short + b"o.", "os.system"),
        "OBJ of an allowed name": (proto + b"(ccollections\nOrderedDict\no.", "OBJ"),
        "NEWOBJ": (proto + b"csubprocess\nPopen\n" + short + b"\x85\x81.", "subprocess.Popen"),
        "NEWOBJ of an allowed name": (proto + b"ccollections\nOrderedDict\n)\x81.", "collections.OrderedDict"),
        "NEWOBJ_EX": (b"\x80\x04ccollections\nOrderedDict\n)}\x92.", "NEWOBJ_EX"),
        "EXT1": (proto + b"\x82\x01)R.", "EXT1"),
        "EXT4": (proto + b"\x84\x01\x00\x00\x00)R.", "EXT4"),
        "BUILD with a setter of attributes": (
            proto + b"ctorch._utils\n_rebuild_tensor_v2\n}U\x08__code__U\x01xsb.",
            "sets the state of a Global",
        ),
        "BUILD of a list": (proto + b"]}b.", "sets the state of a list"),
        "REDUCE of a text": (proto + short + b")R.", "calls a str"),
        "REDUCE of what was built": (proto + b"ccollections\nOrderedDict\n)R)R.", "calls a dict"),
        "attribute by getattr": (proto + b"c__builtin__\ngetattr\n(" + short + b"tR.", "__builtin__.getattr"),
        "import by __import__": (proto + b"c__builtin__\n__import__\nU\x02os\x85R.", "__builtin__.__import__"),
        "pickle in a pickle": (pickle.dumps(Reduces(pickle.loads, pickle.dumps(Reduces(eval, code)))), "pickle.loads"),
        "torch's own unpickler": (proto + b"ctorch\nload\nU\x01x\x85R.", "torch.load"),
        "numpy's object array": (pickle.dumps(np.array([Reduces(eval, code)], object)), "'O8'"),
        "append to a dict": (proto + b"}(K\x01e.", "appends to a dict"),
        "set items of a list": (proto + b"]K\x01K\x02s.", "of a list"),
        "PERSID": (b"Pos.system\n.", "PERSID"),
        "protocol 0 text": (b"\x80\x00S'x'\n.", "STRING"),
        "a set": (pickle.dumps({1, 2}), "EMPTY_SET"),
    }


@pytest.mark.parametrize("attack", attacks(Path("/")))
@pytest.mark.parametrize("layout", ["zip", "legacy", "plain"])
def test_an_attack_is_refused_by_name_and_nothing_is_executed(tmp_path, attack, layout):
    data, name = attacks(tmp_path)[attack]
    path = tmp_path / "x.pt"
    if layout == "zip":
        write_zip(path, data, {})
    else:
        system = pickle.dumps({"little_endian": True}, protocol=2)
        start = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + pickle.dumps(1001, protocol=2) + system
        path.write_bytes((start if layout == "legacy" else b"") + data)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    # A pickle without a protocol's first byte is no file that we would open at all.
    assert name in str(caught.value) or (layout == "plain" and data[:1] != b"\x80")
    assert str(path) in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


def test_the_attacks_are_real(tmp_path):
    """Python's own unpickler runs them, so the refusals above mean something."""
    data, _ = attacks(tmp_path)["REDUCE builtins.exec"]
    program = "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"
    subprocess.run([sys.executable, "-c", program], input=data, check=True)
    assert (tmp_path / "pwned").exists()


def billion_laughs(opener: bytes, closer: bytes) -> bytes:
    """Thirty levels, each holding the one before twice: small to write, 2**30 entries to walk."""
    data = b"\x80\x02" + opener
    for level in range(30):
        recall = b"h" + bytes([level])
        data += b"q" + bytes([level]) + b"0" + (closer % (recall, recall))
    return data + b"."


BOMBS = {
    "dictionaries of dictionaries": (billion_laughs(b"}", b"}(U\x01a%bU\x01b%bu"), "too many"),
    "a dictionary in itself": (b"\x80\x02}q\x00U\x01ah\x00s.", "nested"),
    "a wrapper in itself": (b"\x80\x02}q\x00U\x06moduleh\x00s.", "nested|no dictionary"),
    "a tuple nested through the memo as key": (
        billion_laughs(b"})", b"%b%b\x86")[:-1] + b"K\x01s.",
        "key of type tuple",
    ),
    "a tuple as key": (b"\x80\x02}K\x01K\x02\x86K\x01s.", "key of type tuple"),
    "a colliding key": (b"\x80\x02}\x8a\x09" + (2**64).to_bytes(9, "little") + b"K\x01s.", "key of type int"),
    "a memo never stored": (b"\x80\x02h\x05.", "recalls object 5"),
    "a huge integer": (b"\x80\x02\x8a\xff" + b"\x01" * 255 + b".", "integer of"),
    "an empty stack": (b"\x80\x02R.", "empty stack"),
    "a mark never set": (b"\x80\x02t.", "never set"),
    "a mark as a value": (b"\x80\x02}(K\x01s.", "empty stack"),
    "two objects at the end": (b"\x80\x02}}.", "2 objects on its stack"),
    "no end": (b"\x80\x02}", "its end"),
    "an unknown opcode": (b"\x80\x02\xff.", "does not exist"),
    "a text longer than the file": (b"\x80\x02X\xff\xff\xff\x7fab.", "longer than|damaged"),
    "a name without end": (b"\x80\x02c" + b"a" * 100_000, "cut off"),
    "a numpy array without values": (
        b"\x80\x02}U\x01acnumpy.core.multiarray\n_reconstruct\n(NNNtRs.",
        "never got its values",
    ),
    "tensors of nothing": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x02K\x03K\x04tR.", "no storage"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_quickly(tmp_path, bomb):
    data, message = BOMBS[bomb]
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_zip(tmp_path / "x.pt", data))


def test_the_number_of_opcodes_and_what_is_copied_are_bounded(monkeypatch):
    monkeypatch.setattr(pickle_reader, "MAX_OPCODES", 1000)
    monkeypatch.setattr(pickle_reader, "MAX_BYTES", 10_000)
    encode = {"_codecs.encode": lambda text, encoding: text.encode(encoding)}
    with pytest.raises(pickle_reader.RefusedPickle, match="opcodes"):
        pickle_reader.read_pickle(io.BytesIO(b"\x80\x02" + b"}0" * 2000 + b"}."), {})
    again = b"c_codecs\nencode\nh\x00U\x06latin1\x86R0"
    data = b"\x80\x02X\xe8\x03\x00\x00" + b"a" * 1000 + b"q\x00" + again * 20 + b"."
    with pytest.raises(pickle_reader.RefusedPickle, match="larger than"):
        pickle_reader.read_pickle(io.BytesIO(data), encode)
    with pytest.raises(pickle_reader.RefusedPickle, match="longer than"):
        pickle_reader.read_pickle(io.BytesIO(b"\x80\x02" + (b"X\xe8\x03\x00\x00" + b"a" * 1000 + b"0") * 20), {})


def test_archives_that_are_not_checkpoints(tmp_path):
    data = np.arange(6, dtype=np.float32).tobytes()
    whole = write_zip(tmp_path / "x.pt", tensor_pickle(), {"0": data}).read_bytes()
    for size in (10, len(whole) // 2, len(whole) - 10):
        (tmp_path / "x.pt").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"x\.pt: .*download the file again"):
            open_checkpoint(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="compressed or encrypted"):
        open_checkpoint(write_zip(tmp_path / "x.pt", tensor_pickle(), {"0": data}, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"0 data\.pkl"):
        open_checkpoint(tmp_path / "other.zip")
    (tmp_path / "text.pt").write_text("<html>Sign in to download</html>")
    with pytest.raises(CheckpointError, match="it is no checkpoint: it begins with b'<html>"):
        open_checkpoint(tmp_path / "text.pt")
    for name in ("nothing.pt", "."):
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path / name)


def test_a_truncated_legacy_file_is_refused_wherever_it_ends(torch, tmp_path):
    torch.save({"a": torch.ones(4), "b": torch.zeros(3, 2)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "x.pt").read_bytes()
    for size in range(1, len(whole), 7):
        (tmp_path / "x.pt").write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path / "x.pt")


def test_damaged_bytes_give_a_checkpoint_error_and_nothing_else(tmp_path):
    """Changes one byte of the file: whatever comes out is a checkpoint or a `CheckpointError`."""
    rng = np.random.default_rng(0)
    path = write_zip(tmp_path / "x.pt", tensor_pickle(), {"0": bytes(24)})
    good = np.frombuffer(path.read_bytes(), np.uint8)
    outcomes = set()
    for _ in range(600):
        bad = good.copy()
        bad[rng.integers(len(bad))] = rng.integers(256)
        path.write_bytes(bad.tobytes())
        try:
            open_checkpoint(path)
            outcomes.add("read")
        except CheckpointError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_reading_needs_no_torch():
    program = "import sys, converters.torch_file; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"})
