"""A model space written for NNI, yours or one of its hub: `space: {nni: my_pkg.spaces:MySpace}`."""

from nas.nni import NniSpace

space = NniSpace
