"""The steps that come with the package, in their order. Any method may have them; options switch them on."""

from qvlm_plugin.methods.base import Step, imported, quantizes_activations, quantizes_weights
from qvlm_plugin.scheme import UNQUANTIZED

_PACKAGE = "qvlm_plugin.methods"

TOKENS = Step(
    "tokens",
    imported(f"{_PACKAGE}.importance:weigh_tokens"),
    lambda scheme, options: (
        options.importance == "modality" or (options.importance == "jacobian" and options.activations == "token")
    ),
    imported(f"{_PACKAGE}.importance:require_answers_to_look_at"),
)
"""How much the errors of tokens count in what is searched."""

AWQ = Step(
    "awq",
    imported(f"{_PACKAGE}.awq:scale_and_clip"),
    lambda scheme, options: options.transform == "awq" and quantizes_weights(scheme),
)
"""Scales of channels and clipping of weights, for the weights' sake."""

SMOOTH = Step(
    "smooth",
    imported(f"{_PACKAGE}.smooth:smooth"),
    lambda scheme, options: "smooth" in options.transforms and quantizes_activations(scheme),
)
"""Scales of channels, for the activations' sake."""

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
"""Narrowed ranges of groups of weights, for the least squared error."""

MEANS = Step(
    "means",
    imported(f"{_PACKAGE}.means:observe_means"),
    lambda scheme, options: (
        (options.bias_correction and quantizes_weights(scheme)) or (options.center and quantizes_activations(scheme))
    ),
)
"""Mean inputs, by which biases are corrected and tokens centered."""

MINMAX = Step(
    "minmax",
    imported(f"{_PACKAGE}.minmax:observe_extremes"),
    lambda scheme, options: options.observer == "minmax" and quantizes_activations(scheme),
)
"""Ranges as wide as what was seen."""

LP = Step(
    "lp",
    imported(f"{_PACKAGE}.lp:search_ranges"),
    lambda scheme, options: options.observer == "lp" and quantizes_activations(scheme),
)
"""Ranges of least l_p distance, less those that `JACOBIAN` searches."""

JACOBIAN = Step(
    "jacobian",
    imported(f"{_PACKAGE}.importance:search_important_ranges"),
    lambda scheme, options: (
        options.importance == "jacobian"
        and options.activations == "channel"
        and scheme.decoder.activation != UNQUANTIZED
    ),
    imported(f"{_PACKAGE}.importance:require_answers_to_look_at"),
)
"""Ranges of static sites by errors that the answers weigh."""

ZERO = Step(
    "zero",
    imported(f"{_PACKAGE}.zero:put_zero_on_grids"),
    lambda scheme, options: options.zero_on_grid and scheme.decoder.activation != UNQUANTIZED,
    needs_calibration=False,
)
"""Static ranges with 0 among their points."""

GPTQ = Step(
    "gptq",
    imported(f"{_PACKAGE}.weight_rounding:round_weights"),
    lambda scheme, options: options.rounding == "gptq" and quantizes_weights(scheme),
    splits=True,
)
"""Codes of weights, each column making up for the errors of those before."""

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
"""Dependencies before the tower is optimized, for the threshold of the partition."""

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
"""All of them: transforms, means, ranges, codes, then what is fitted on these."""
