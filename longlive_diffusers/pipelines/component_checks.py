"""Whether a pipeline has what every video needs: a network of this package, and a solver for what it predicts."""

from typing import Any

from diffusers import ConfigMixin, WanTransformer3DModel

from ..nvfp4.optimized_layers import check_not_compiled_since


NOT_VELOCITIES = ("epsilon", "sample", "v_prediction")


def check_has_transformer(transformer: Any, why: str) -> None:
    """Raise a ValueError if the transformer of a pipeline is missing, which says what it is needed for."""
    if transformer is None:
        raise ValueError(f"This pipeline has no transformer: {why}.")


def check_components(transformer: Any, scheduler: Any) -> None:
    """Raise a ValueError if the transformer or the scheduler of a pipeline is missing, or of another kind, or
    the transformer was compiled after it was optimized."""
    missing = [name for name, it in (("transformer", transformer), ("scheduler", scheduler)) if it is None]
    if missing:
        raise ValueError(f"This pipeline has no {' and no '.join(missing)}, without which it makes no video.")
    if isinstance(transformer, WanTransformer3DModel):
        raise ValueError(
            "The transformer is a WanTransformer3DModel: give the pipeline `LongLiveTransformer3DModel.from_wan(it)`."
        )
    check_not_compiled_since(transformer)
    predicts = scheduler.config.get("prediction_type") if isinstance(scheduler, ConfigMixin) else None
    if predicts in NOT_VELOCITIES:
        raise ValueError(
            f"{type(scheduler).__name__} solves for prediction_type '{predicts}', and this model predicts velocities: "
            "use LongLiveScheduler, one of diffusers' FlowMatch schedulers, or one with prediction_type "
            "'flow_prediction'."
        )
