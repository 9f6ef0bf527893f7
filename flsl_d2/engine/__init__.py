"""What the tools share: processes, configs, command lines and the detection loops."""
