//! QEMU: its command line (pure), its process, its monitor (QMP), migration, what is
//! added while it runs.

pub mod argv;
pub mod balloon;
pub mod bzimage;
pub mod devices;
pub mod hotplug;
pub mod migrate;
pub mod qmp;
pub mod virtio;
