//! What a shared library of this host says of itself.

use std::ffi::{CStr, CString};

/// The text that a function of a library returns which takes nothing and returns a constant
/// string; `None` where there is no such library or function. The library's initialisers run
/// in this process: name only what this host's programs load themselves.
pub fn text_of(library: &str, function: &str) -> Option<String> {
    let (library, function) = (CString::new(library).ok()?, CString::new(function).ok()?);
    // SAFETY: two C strings; a handle and a symbol are checked before they are used. The
    // function's type is what its documentation says, and its string lives as long as the
    // library, which is not unloaded.
    unsafe {
        let handle = libc::dlopen(library.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
        if handle.is_null() {
            return None;
        }
        let found = libc::dlsym(handle, function.as_ptr());
        if found.is_null() {
            return None;
        }
        let call: extern "C" fn() -> *const libc::c_char = std::mem::transmute(found);
        let text = call();
        (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
    }
}
