"""The notebook runs from its first cell to its last, and its pictures come out."""

import base64
import io
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

NOTEBOOK = Path(__file__).parents[2] / "recipes" / "distill_in_a_notebook.ipynb"


def test_it_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert notebook.metadata.kernelspec.name == "python3"
    assert str(Path.home()) not in NOTEBOOK.read_text()


@pytest.mark.runs
def test_it_runs(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.text for output in outputs if output.output_type == "stream")

    table = re.findall(r"^(\w+) +(\d+\.\d\d)% +\d+ +\d+\.\d\d$", text, re.MULTILINE)
    accuracies = {name: float(figure) for name, figure in table}
    assert [*accuracies][:4] == ["teacher", "baseline", "student", "student_onnx"]
    accuracies = {name: accuracies[name] for name in ("teacher", "baseline", "student")}
    assert accuracies["teacher"] > 90
    assert min(accuracies.values()) > 50
    # The saved models, through their own preprocessing, are right as often as the trainer said.
    hits = {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+) of 360 right$", text, re.MULTILINE)}
    assert {name: 100 * count / 360 for name, count in hits.items()} == pytest.approx(accuracies, abs=0.6)

    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 4  # the data, the curves, the loss's components, predictions
    assert (tmp_path / "outputs" / "notebook" / "report.html").is_file()
    for picture in pictures:
        with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
            assert min(image.size) > 100
            assert len(image.convert("L").getcolors()) > 50
    assert (tmp_path / "outputs" / "notebook" / "student" / "model.safetensors").is_file()
