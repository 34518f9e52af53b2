"""The commands of `megagrow`, one module each; the scripts of `launch/` are the same commands."""
