"""Parts that every run needs: configs, command lines, processes, stopping, output folders."""
