"Settings, sealed directories, pinned downloads and tables: what every other chapter stands on, without torch"
