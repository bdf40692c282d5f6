"""The pipeline suite: compression, lanes and SM shares under load, judged by what a user of a server sees."""
