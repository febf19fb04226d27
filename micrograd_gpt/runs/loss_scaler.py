"""Loss scaling, which keeps the gradients of a float16 run within float16's range."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any


@dataclasses.dataclass
class LossScaler:
    """The factor that keeps the gradients of a float16 run within float16's range.

    The loss is multiplied by `scale` before its backward, so that small gradients do not round to
    zero, and `clip_grad_norm` divides the parameters' gradients by it. Where they are not finite,
    the scale was too large: the step must not be taken, and the scale is halved. After
    `growth_interval` steps in a row that were taken, it is doubled. Micikevicius et al. 2018
    (arXiv:1710.03740), section 3.2; the defaults are those of PyTorch's GradScaler.
    """

    enabled: bool = True  # False: the scale stays 1, and every step may be taken
    scale: float = 65536.0
    growth_interval: int = 2000
    good_steps: int = 0  # how many were taken since the scale last changed
    skipped_steps: int = 0  # how many were not taken, in all

    def __post_init__(self) -> None:
        self.scale = self.scale if self.enabled else 1.0

    def update(self, grad_norm: Any) -> bool:
        """Whether the step with this gradient norm may be taken; adjusts the scale accordingly.

        A norm is not read unless scaling is enabled. Raises FloatingPointError where the scale
        would fall below 1, since then the scale is not what makes the gradients overflow.
        """
        if not self.enabled:
            return True
        if math.isfinite(grad_norm):
            self.good_steps += 1
            if self.good_steps == self.growth_interval:
                self.scale, self.good_steps = self.scale * 2, 0
            return True
        if self.scale / 2 < 1:
            raise FloatingPointError(
                f"the gradients overflow float16 even at a loss scale of {self.scale:g}: try "
                "bfloat16, or a smaller learning rate"
            )
        self.scale, self.good_steps = self.scale / 2, 0
        self.skipped_steps += 1
        return False


def scaler_for(dtype: str) -> LossScaler:
    """The scaler of a run of this type, which only float16 needs. Overflows do no harm then, and
    NumPy does not warn of them any more."""
    scaler = LossScaler(enabled=dtype == "float16")
    if scaler.enabled:
        warnings.filterwarnings("ignore", "(invalid value|overflow) encountered", RuntimeWarning)
    return scaler
