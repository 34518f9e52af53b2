"""The commands of `megagrow`, a module each; the scripts of `launch/` are the same commands."""
