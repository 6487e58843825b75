"""Raw data sets: image folder, webdataset tars, CSV table."""
