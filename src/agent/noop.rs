//! The agent that is none: for bare VMs, and tests of what needs no guest.
//!
//! Invariant: it is there at once and always, and can do nothing: each call but
//! Check is [`Error::Unsupported`].

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::address::Address;
use super::seat::{Capabilities, Channel, Seat};
use super::{Agent, Error, Kind, Link, ListFormat, Outcome, ProcessId};
use crate::proto::agent::{
    CopyFileRequest, CreateContainerRequest, CreateSandboxRequest, GuestDetailsResponse,
    StatsContainerResponse,
};
use crate::proto::oci::{LinuxResources, Process};
use crate::proto::types::{Interface, Route};

/// No agent.
#[derive(Clone, Copy, Debug)]
pub struct Noop;

fn no<T>(call: &'static str) -> Outcome<T> {
    Err(Error::Unsupported { call })
}

impl Agent for Noop {
    fn kind(&self) -> Kind {
        Kind::Noop
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    fn configure(&mut self, _: &Seat) -> Outcome<Vec<Channel>> {
        Ok(Vec::new())
    }

    fn configure_from_grpc(&mut self, _: &[u8]) -> Outcome<()> {
        Ok(())
    }

    fn address(&self) -> &Address {
        &Address::Noop
    }

    fn reuse(&mut self, other: Box<dyn Agent>) -> Outcome<()> {
        match other.kind() {
            Kind::Noop => Ok(()),
            _ => no("reuse (of another agent's)"),
        }
    }

    fn give_link(self: Box<Self>) -> Option<Link> {
        None
    }

    fn share_path(&self, sandbox: &str) -> PathBuf {
        Path::new("/run/vmcache/shared").join(sandbox)
    }

    fn create_sandbox(&self, _: &str) -> Outcome<PathBuf> {
        no("create_sandbox")
    }

    fn cleanup(&self, _: &str) -> Outcome<()> {
        no("cleanup")
    }

    fn connect(&self, _: Duration, _: bool) -> Outcome<()> {
        Ok(())
    }

    fn disconnect(&self) {}

    fn hang_up(&self) {}

    fn check(&self, _: Duration) -> Outcome<()> {
        Ok(())
    }

    fn version(&self) -> Outcome<(String, String)> {
        no("Version")
    }

    fn guest_details(&self) -> Outcome<GuestDetailsResponse> {
        no("GetGuestDetails")
    }

    fn start_sandbox(&self, _: CreateSandboxRequest) -> Outcome<()> {
        no("CreateSandbox")
    }

    fn stop_sandbox(&self) -> Outcome<()> {
        no("DestroySandbox")
    }

    fn create_container(&self, _: CreateContainerRequest) -> Outcome<()> {
        no("CreateContainer")
    }

    fn start_container(&self, _: &str) -> Outcome<()> {
        no("StartContainer")
    }

    fn stop_container(&self, _: &str, _: Duration) -> Outcome<()> {
        no("RemoveContainer")
    }

    fn exec(&self, _: &ProcessId, _: Process) -> Outcome<()> {
        no("ExecProcess")
    }

    fn signal_process(&self, _: &ProcessId, _: u32) -> Outcome<()> {
        no("SignalProcess")
    }

    fn wait_process(&self, _: &ProcessId, _: Option<Duration>) -> Outcome<i32> {
        no("WaitProcess")
    }

    fn write_process_stdin(&self, _: &ProcessId, _: Vec<u8>) -> Outcome<u32> {
        no("WriteStdin")
    }

    fn read_process_stdout(&self, _: &ProcessId, _: u32) -> Outcome<Vec<u8>> {
        no("ReadStdout")
    }

    fn read_process_stderr(&self, _: &ProcessId, _: u32) -> Outcome<Vec<u8>> {
        no("ReadStderr")
    }

    fn close_process_stdin(&self, _: &ProcessId) -> Outcome<()> {
        no("CloseStdin")
    }

    fn winsize_process(&self, _: &ProcessId, _: u32, _: u32) -> Outcome<()> {
        no("TtyWinResize")
    }

    fn stats_container(&self, _: &str) -> Outcome<StatsContainerResponse> {
        no("StatsContainer")
    }

    fn pause_container(&self, _: &str) -> Outcome<()> {
        no("PauseContainer")
    }

    fn resume_container(&self, _: &str) -> Outcome<()> {
        no("ResumeContainer")
    }

    fn update_container(&self, _: &str, _: LinuxResources) -> Outcome<()> {
        no("UpdateContainer")
    }

    fn process_list_container(&self, _: &str, _: ListFormat, _: &[String]) -> Outcome<Vec<u8>> {
        no("ListProcesses")
    }

    fn online_cpu_mem(&self, _: u32, _: bool) -> Outcome<()> {
        no("OnlineCPUMem")
    }

    fn mem_hotplug_by_probe(&self, _: &[u64]) -> Outcome<()> {
        no("MemHotplugByProbe")
    }

    fn reseed_rng(&self, _: &[u8]) -> Outcome<()> {
        no("ReseedRandomDev")
    }

    fn set_guest_date_time(&self, _: Duration) -> Outcome<()> {
        no("SetGuestDateTime")
    }

    fn copy_file(&self, _: CopyFileRequest) -> Outcome<()> {
        no("CopyFile")
    }

    fn list_interfaces(&self) -> Outcome<Vec<Interface>> {
        no("ListInterfaces")
    }

    fn update_interface(&self, _: Interface) -> Outcome<Interface> {
        no("UpdateInterface")
    }

    fn list_routes(&self) -> Outcome<Vec<Route>> {
        no("ListRoutes")
    }

    fn update_routes(&self, _: Vec<Route>) -> Outcome<Vec<Route>> {
        no("UpdateRoutes")
    }
}
