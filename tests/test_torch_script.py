"""TorchScript programs without torch: their tensors are read, their code is not."""

import pickle
import struct
import zipfile

import numpy as np
import pytest
from torch_archives import tensor_pickle, write_zip

from converters.torch_file import CheckpointError, open_checkpoint


def script_pickle(**attributes: bytes) -> bytes:
    """The opcodes of a TorchScript module with these attributes, given as opcodes themselves."""
    items = b"".join(
        pickle.BINUNICODE + struct.pack("<I", len(name)) + name.encode() + value for name, value in attributes.items()
    )
    state = pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
    return pickle.GLOBAL + b"__torch__.net\nNet\n" + pickle.EMPTY_TUPLE + pickle.NEWOBJ + state + pickle.BUILD


def test_the_tensors_of_a_torchscript_program_are_read_and_its_code_is_not(tmp_path):
    data = np.arange(6, dtype=np.float32)
    tensor = tensor_pickle()[len(pickle.PROTO) + 1 + len(pickle.EMPTY_DICT) + 6 : -2]
    inner = script_pickle(weight=tensor, training=pickle.NEWFALSE)

    def program(body: bytes):
        path = write_zip(tmp_path / "script.pt", pickle.PROTO + b"\x02" + body + pickle.STOP, {"0": data.tobytes()})
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("archive/constants.pkl", b"cos\nsystem\n.")
            archive.writestr("archive/code/__torch__/net.py", "raise SystemExit")
        return path

    with open_checkpoint(program(script_pickle(visual=inner, size=pickle.BININT1 + b"\x07"))) as checkpoint:
        assert list(checkpoint) == ["visual.weight"]
        np.testing.assert_array_equal(checkpoint["visual.weight"], data.reshape(2, 3))
        assert checkpoint.notes[0] == "took the tensors of a TorchScript program and left its code alone"
    called = pickle.GLOBAL + b"__torch__.net\nNet\n" + pickle.EMPTY_TUPLE + pickle.REDUCE
    with pytest.raises(CheckpointError, match="it calls a _Blank, which is not a function"):
        open_checkpoint(program(called))
    with pytest.raises(CheckpointError, match=r"it asks for os\.system"):
        open_checkpoint(program(script_pickle(visual=pickle.GLOBAL + b"os\nsystem\n")))
    stateless = (
        pickle.GLOBAL + b"__torch__.net\nNet\n" + pickle.EMPTY_TUPLE + pickle.NEWOBJ + pickle.NONE + pickle.BUILD
    )
    with pytest.raises(CheckpointError, match="sets attributes of an object to a NoneType"):
        open_checkpoint(program(stateless))
    # In an archive that is no program such classes are as foreign as any.
    with pytest.raises(CheckpointError, match=r"it asks for __torch__\.net\.Net"):
        open_checkpoint(write_zip(tmp_path / "x.pt", pickle.PROTO + b"\x02" + inner + pickle.STOP))
