"""The semantic expert-parallel group: process groups, dispatch and combine."""
