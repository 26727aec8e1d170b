"""A module that breaks the sandbox from the zygote, where only trusted modules are preloaded: for the probe to find."""

from runner.sandbox import landlock

landlock.restrict = lambda rights, ports: None
