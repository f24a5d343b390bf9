"""The steps that come with the package, in the order in which they run. Options switch them on, for every method."""

from qvlm_plugin.methods.base import Step, imported, quantizes_activations, quantizes_weights
from qvlm_plugin.scheme import UNQUANTIZED

_PACKAGE = "qvlm_plugin.methods"

TOKENS = Step(
    "tokens",
    imported(f"{_PACKAGE}.importance:weigh_tokens"),
    lambda scheme, options: (
        options.importance == "modality" or (options.importance == "jacobian" and not JACOBIAN.wanted(scheme, options))
    ),
    imported(f"{_PACKAGE}.importance:require_answers_for_importance"),
)
"""Token weights: factors of the tokens' errors in later steps."""

AWQ = Step(
    "awq",
    imported(f"{_PACKAGE}.awq:scale_and_clip"),
    lambda scheme, options: options.transform == "awq" and quantizes_weights(scheme),
)
"""Channel scales and clipping factors that reduce weight errors."""

SMOOTH = Step(
    "smooth",
    imported(f"{_PACKAGE}.smooth:smooth"),
    lambda scheme, options: "smooth" in options.transforms and quantizes_activations(scheme),
)
"""Channel scales that reduce activation errors."""

ROTATE = Step(
    "rotate",
    imported(f"{_PACKAGE}.rotate:rotate_inputs"),
    lambda scheme, options: "rotate" in options.transforms,
    needs_calibration=False,
)
"""Orthogonal matrices that spread massive channels over all."""

CLIP = Step(
    "clip",
    imported(f"{_PACKAGE}.weight_clip:clip_weights"),
    lambda scheme, options: options.weight_clip == "mse" and quantizes_weights(scheme),
    needs_calibration=False,
)
"""Clipping factors of weight groups with the least squared error."""

MEANS = Step(
    "means",
    imported(f"{_PACKAGE}.means:observe_means"),
    lambda scheme, options: (
        (options.bias_correction and quantizes_weights(scheme)) or (options.center and quantizes_activations(scheme))
    ),
)
"""Mean inputs for bias correction and centering."""

MINMAX = Step(
    "minmax",
    imported(f"{_PACKAGE}.minmax:observe_extremes"),
    lambda scheme, options: options.observer == "minmax" and quantizes_activations(scheme),
    needs_calibration=lambda scheme, options: (
        options.activations == "channel" and scheme.decoder.activation != UNQUANTIZED
    ),
)
"""Ranges from observed extremes."""

LP = Step(
    "lp",
    imported(f"{_PACKAGE}.lp:search_ranges"),
    lambda scheme, options: options.observer == "lp" and quantizes_activations(scheme),
)
"""Ranges with the least l_p distance, except those that `JACOBIAN` searches."""

JACOBIAN = Step(
    "jacobian",
    imported(f"{_PACKAGE}.importance:search_important_ranges"),
    lambda scheme, options: (
        options.importance == "jacobian"
        and options.activations == "channel"
        and scheme.decoder.activation != UNQUANTIZED
    ),
    imported(f"{_PACKAGE}.importance:require_answers_for_importance"),
)
"""Ranges of static sites with the least error weighted by Jacobians."""

ZERO = Step(
    "zero",
    imported(f"{_PACKAGE}.zero:put_zero_on_grids"),
    lambda scheme, options: options.zero_on_grid and scheme.decoder.activation != UNQUANTIZED,
    needs_calibration=False,
)
"""Static ranges shifted so that 0 is a rounding point."""

GPTQ = Step(
    "gptq",
    imported(f"{_PACKAGE}.weight_rounding:round_weights"),
    lambda scheme, options: options.rounding == "gptq" and quantizes_weights(scheme),
    splits=True,
)
"""Codes of weights, where each column compensates the errors of earlier ones."""

DEPENDENCIES = Step(
    "dependencies",
    imported(f"{_PACKAGE}.qvlm.block_dependency:observe_before"),
    lambda scheme, options: (
        BLOCKS.wanted(scheme, options)
        and VISION.wanted(scheme, options)
        and scheme.decoder.activation != UNQUANTIZED
        and options.h0 is None
    ),
    splits=True,
)
"""Dependencies before the tower is optimized, for the partition's threshold."""

VISION = Step(
    "vision",
    imported(f"{_PACKAGE}.qvlm.vision:train_tower"),
    lambda scheme, options: options.veo and scheme.vision.activation != UNQUANTIZED,
    imported(f"{_PACKAGE}.qvlm.vision:require_answers_to_train_on"),
)
"""Q-VLM's visual encoder optimization."""

BLOCKS = Step(
    "blocks",
    imported(f"{_PACKAGE}.qvlm.mining:search_blocks"),
    lambda scheme, options: (
        options.cdm and any(getattr(scheme, part).activation != UNQUANTIZED for part in options.mined_parts)
    ),
    splits=True,
)
"""Q-VLM's dependency mining and joint search, on the optimized tower."""

STEPS = (TOKENS, AWQ, SMOOTH, ROTATE, CLIP, MEANS, MINMAX, LP, JACOBIAN, ZERO, GPTQ, DEPENDENCIES, VISION, BLOCKS)
"""All steps: transforms, means, ranges and codes first, then Q-VLM's steps, which start from them."""
