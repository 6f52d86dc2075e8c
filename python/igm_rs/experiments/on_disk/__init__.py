"""The paper's five data sets, read from the folders that their authors lay out."""
