"""Checkpoints: tensors in and out of directories, all or nothing, from the disk or from the hub.

Import from the modules (`lathe.checkpoint.tensors`, `.atomic`, `.hub`, `.digest`, `.layout`); this file
imports nothing, so that what needs no torch starts without it.
"""
