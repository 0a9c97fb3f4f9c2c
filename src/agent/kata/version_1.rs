//! What agents of 1.x want otherwise than later ones, in a container's
//! specification.
//!
//! - Field numbers of system call filters: there, `LinuxSeccomp.Syscalls` and
//!   `LinuxSyscall.Args` are 3, where later versions have `Flags` and `ErrnoRet`.
//! - No PID namespace: they add one themselves, and in a container with two, no
//!   further process starts.
//!
//! Source: oci.proto of Kata's agent 1.0 to 1.13, and of 2.x; grpc.go of the agent.

use protobuf::Message;

use super::super::{Error, Outcome};
use crate::proto::oci::Spec;

/// Number of both fields in 1.x.
const IN_1: u32 = 3;

/// Changes a container's specification for an agent of 1.x.
///
/// # Errors
/// [`Error::Request`] for what 1.x has no field for.
pub fn adapt(spec: &mut Spec) -> Outcome<()> {
    if let Some(linux) = spec.Linux.as_mut() {
        linux.Namespaces.retain(|n| n.Type != "pid");
    }
    renumber(spec)
}

/// Decoders skip fields that they do not know, so what moves is written as one.
fn renumber(spec: &mut Spec) -> Outcome<()> {
    let refused = |why: &str| Error::Request { call: "CreateContainer", why: why.into() };
    let Some(seccomp) = spec.Linux.as_mut().and_then(|linux| linux.Seccomp.as_mut()) else {
        return Ok(());
    };
    if !seccomp.Flags.is_empty() {
        return Err(refused("agents of 1.x have no seccomp flags"));
    }
    for mut call in std::mem::take(&mut seccomp.Syscalls) {
        if call.ErrnoRet.is_some() {
            return Err(refused("agents of 1.x have no errno for a filtered system call"));
        }
        for argument in std::mem::take(&mut call.Args) {
            let bytes = argument.write_to_bytes().map_err(|e| refused(&e.to_string()))?;
            call.special_fields.mut_unknown_fields().add_length_delimited(IN_1, bytes);
        }
        let bytes = call.write_to_bytes().map_err(|e| refused(&e.to_string()))?;
        seccomp.special_fields.mut_unknown_fields().add_length_delimited(IN_1, bytes);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::oci::{Linux, LinuxNamespace, LinuxSeccomp, LinuxSeccompArg, LinuxSyscall};

    #[test]
    fn a_filter_is_written_with_the_numbers_of_version_1() {
        let call = LinuxSyscall {
            Names: vec!["kill".into()],
            Action: "SCMP_ACT_ERRNO".into(),
            Args: vec![LinuxSeccompArg { Index: 1, Value: 9, ..Default::default() }],
            ..Default::default()
        };
        let seccomp = LinuxSeccomp { Syscalls: vec![call], ..Default::default() };
        let namespace = |t: &str| LinuxNamespace { Type: t.into(), ..Default::default() };
        let linux = Linux {
            Seccomp: Some(seccomp).into(),
            Namespaces: ["pid", "mount"].map(namespace).to_vec(),
            ..Default::default()
        };
        let mut spec = Spec { Linux: Some(linux).into(), ..Default::default() };
        adapt(&mut spec).unwrap();
        assert_eq!(spec.Linux.Namespaces, [namespace("mount")]);
        let seccomp = &spec.Linux.Seccomp;
        let bytes = seccomp.write_to_bytes().unwrap();
        // Field 3, length-delimited: a system call, in it again field 3: its argument.
        let inner =
            [&[0x0a, 4][..], b"kill", &[0x12, 14], b"SCMP_ACT_ERRNO", &[0x1a, 4, 8, 1, 16, 9]];
        let inner = inner.concat();
        assert_eq!(bytes, [&[0x1a, inner.len() as u8][..], &inner].concat());

        spec.Linux.as_mut().unwrap().Seccomp.as_mut().unwrap().Flags = vec!["x".into()];
        assert!(matches!(adapt(&mut spec), Err(Error::Request { .. })));
    }
}
