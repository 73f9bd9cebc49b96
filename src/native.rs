//! The only unsafe code of the crate: three calls into C that no safe wrapper offers.
#![allow(unsafe_code)]

/// Loads a shared library for its initializers and keeps it for the life of the process.
pub fn load_and_keep(name: &str) -> Result<(), libloading::Error> {
    // SAFETY: loading runs the library's initializers. Callers name libtorch's own libraries, of the version that this
    // program is linked to (the loader finds them along the same path); PyTorch itself loads them the same way at start.
    // The library is never unloaded: `forget` keeps the code that it registered mapped.
    let library = unsafe { libloading::Library::new(name)? };
    std::mem::forget(library);
    Ok(())
}

/// Tells glibc's allocator to keep freed memory for the next step. Call before other threads start.
///
/// A synthesis step allocates and frees the same large feature maps again and again. By default glibc maps and unmaps
/// each of them, and the kernel clears every page anew: a quarter of a step's time on two cores. Memory use stays that of
/// the largest step.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        /// The largest threshold that glibc accepts; larger tensors are still mapped.
        const MMAP_THRESHOLD: libc::c_int = 32 << 20;
        const NEVER_TRIM: libc::c_int = libc::c_int::MAX;
        const TOP_PAD: libc::c_int = 64 << 20;
        // SAFETY: mallopt only sets numbers inside the allocator; no other thread allocates yet.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD);
            libc::mallopt(libc::M_TRIM_THRESHOLD, NEVER_TRIM);
            libc::mallopt(libc::M_TOP_PAD, TOP_PAD);
            // Arenas of other threads are limited to 64 MiB a heap and give memory back whatever the thresholds say.
            libc::mallopt(libc::M_ARENA_MAX, 1);
        }
    }
}

/// Ends the process without running destructors of this program or of its libraries: libtorch's would pull the ground
/// from under a step that still runs on another thread, and the process would end with a crash instead of `code`.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit never returns and touches no memory of the process.
    unsafe { libc::_exit(code) }
}
