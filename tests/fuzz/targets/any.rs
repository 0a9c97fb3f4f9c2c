//! The target that this program is named after, for libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let target = vmcache::fuzzing::TARGETS.iter().find(|t| t.name == env!("CARGO_BIN_NAME"));
    (target.expect("no such target").run)(bytes);
});
