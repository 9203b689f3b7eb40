"""Formats that a student can be had in: one file each, each verified against the student's own ONNX."""

from nas.student.formats.base import Format, add_format, formats
from nas.student.formats.executorch import ExecuTorch
from nas.student.formats.native import Onnx, Pt2
from nas.student.formats.open_vino import OpenVino

__all__ = ["ExecuTorch", "Format", "Onnx", "OpenVino", "Pt2", "add_format", "formats"]
