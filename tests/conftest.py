"""Fixtures shared by the test suite."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Read when Triton is first imported, which nothing above does.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Most tests compute next to nothing: waiting for other threads would take longer. Those about threads set their own.
torch.set_num_threads(1)
pytest.register_assert_rewrite("fastvit_kernels.testing")


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in the same hook
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Several processes share the tests file by file, or folder by folder where one build serves all files."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            shared = item.path.parent if item.path.parent.name in ("cuda", "packaging") else item.path
            item.add_marker(pytest.mark.xdist_group(str(shared)))


@pytest.fixture(scope="session", autouse=True)
def _rounded_bfloat16():
    """Triton's interpreter rounds to bf16 like a GPU."""
    from fastvit_kernels.testing.triton_interpreter import rounded_bfloat16

    with rounded_bfloat16():
        yield


@pytest.fixture
def tiny_cvt():
    """Makes small CvTs of transformers with weights so large that every layer matters; arguments go to `CvtConfig`."""
    from transformers import CvtConfig, CvtForImageClassification

    def make(seed: int = 0, **config):
        torch.manual_seed(seed)
        small = {"depth": [1, 2, 3], "embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "num_labels": 7}
        model = CvtForImageClassification(CvtConfig(**{**small, "drop_path_rate": [0.0, 0.0, 0.0], **config}))
        with torch.no_grad():
            for parameter in model.parameters():
                scale = 0.3 if parameter.ndim < 2 else 2.0 / parameter[0].numel() ** 0.5
                parameter.normal_(0.0, scale)
            for name, buffer in model.named_buffers():
                if buffer.is_floating_point():
                    buffer.uniform_(0.5, 1.5) if name.endswith("var") else buffer.normal_(0.0, 0.3)
        return model.eval()

    return make
