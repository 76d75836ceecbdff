"""The benchmark notebooks run from top to bottom, and what they read is found in RESULTS.md."""

import importlib.util

import pytest

from experiments.notebooks.recorded import RecordError, number, numbers, table, tables

if importlib.util.find_spec("nbclient") is None or importlib.util.find_spec("ipykernel") is None:
    pytest.skip("needs pip install .[notebooks]", allow_module_level=True)

import nbformat

from experiments.notebooks.execute import execute, notebooks

# Bytes of all notebooks: they are in the repository with their pictures.
MOST_BYTES = 1_500_000


# zmq closes its sockets when it is collected.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_notebooks_run_and_keep_the_outputs_of_such_a_run(path):
    kept, ran = nbformat.read(path, as_version=4), execute(path)
    for cell, again in zip(kept.cells, ran.cells, strict=True):
        if cell.cell_type == "code":
            assert cell.execution_count == again.execution_count
            assert {output.output_type for output in cell.outputs} == {output.output_type for output in again.outputs}
            assert not [output for output in again.outputs if output.get("name") == "stderr"]


def test_there_are_five_and_they_stay_small():
    assert [path.stem[0] for path in notebooks()] == list("12345")
    assert sum(path.stat().st_size for path in notebooks()) < MOST_BYTES


def test_tables_of_the_record_are_found_by_heading_and_column():
    text = (
        "# Measured\n\n## One\n\ntext\n\n| a | b |\n| --- | --- |\n| 1 (2) | x |\n\n| c |\n| --- |\n| .5 |\n\n## Two\n"
    )
    assert tables("One", text) == [[{"a": "1 (2)", "b": "x"}], [{"c": ".5"}]]
    assert tables("Two", text) == []
    with pytest.raises(RecordError, match="no section 'Three'; it has 'One', 'Two'"):
        tables("Three", text)
    with pytest.raises(RecordError, match="has the column 'no such'"):
        table("Splatting", "no such")
    assert numbers("1.50 (-.25), 2e-3, 256² v5e M=3") == [1.5, -0.25, 0.002, 256, 3]
    assert number("-") == 0
