//! The heap.

/// Gives memory back to the system that was freed and that the allocator keeps: glibc does so
/// by itself only at the end of its heaps.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes a number and frees nothing that is in use; any thread may call it.
    unsafe {
        libc::malloc_trim(0);
    }
}
