"""A model space of NNI, or of your own written for NNI: `space: {nni: my_pkg.spaces:MySpace}`."""

from nas.nni import require

require("A model space of NNI")

from nas.nni.spaces import NniSpace  # noqa: E402

space = NniSpace
