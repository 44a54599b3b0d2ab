"""What distillation starts from: whose weights each network has."""

import pytest
import torch

from run import distillation_start
from run.arguments import OptimizationArguments
from run.distillation_arguments import NetworkArguments
from run.distillation_start import build_networks
from tests.support.tiny_pipeline import tiny_transformer


@pytest.mark.parametrize("options", [{"revision": "v2"}, {"variant": "bf16"}, {"revision": "v2", "variant": "bf16"}])
@pytest.mark.parametrize("other", [None, "other"])
def test_the_teacher_is_of_the_revision_and_variant_of_the_start_unless_it_is_another(monkeypatch, options, other):
    loaded = []

    def load(source, dtype, chunk_size, **options):
        loaded.append((source, options))
        return tiny_transformer()

    monkeypatch.setattr(distillation_start, "load_transformer", load)
    model = NetworkArguments("start", train_all_weights=True, teacher_model_name_or_path=other, **options)
    build_networks(tiny_transformer(), model, OptimizationArguments(), frozen_dtype=torch.float32)
    expected = {"revision": None, "variant": None} | options if other is None else {}
    assert loaded == [(other or "start", expected)]
