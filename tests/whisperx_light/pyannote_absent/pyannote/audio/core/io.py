AudioFile = object
