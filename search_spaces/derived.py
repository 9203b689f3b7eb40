"""Your own trained model as a search space: `space: {model: my_pkg.models:build, weights: my.safetensors}`."""

from nas.derived import DerivedSpace

space = DerivedSpace
