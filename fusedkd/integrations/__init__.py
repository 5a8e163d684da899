"""The losses inside other people's trainers. Nothing here is imported by `import fusedkd`."""
