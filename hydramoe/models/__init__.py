"Base models in any precision: loaded, named, templated, and read at any depth"
