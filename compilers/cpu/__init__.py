"""Schedules for LLVM CPUs."""
