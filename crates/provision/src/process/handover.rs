//! Passes arguments to a process after its start, over its standard input, so that it can be started and loaded before they are known.

use std::{
    ffi::{OsStr, OsString},
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::{OsStrExt as _, OsStringExt as _},
    },
    process::Stdio,
};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType,
};

/// Room for the longest arguments: two paths and a number.
const MAX_MESSAGE: usize = 16 << 10;

/// The sending side. Dropping it tells the process that there will be no arguments.
#[derive(Debug)]
pub(super) struct Sender {
    ours: OwnedFd,
    /// Kept open until the arguments are sent, so that sending doesn't fail if the process has exited: its exit is reported elsewhere.
    theirs: OwnedFd,
}

impl Sender {
    pub(super) fn new() -> io::Result<Self> {
        // This type preserves message boundaries.
        let kind = SocketType::SEQPACKET;
        let (ours, theirs) = rustix::net::socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
        Ok(Self { ours, theirs })
    }

    /// The standard input to start the process with.
    pub(super) fn stdin(&self) -> io::Result<Stdio> {
        Ok(self.theirs.try_clone()?.into())
    }

    /// Sends the arguments, none of which may contain a NUL, and a copy of the descriptor.
    pub(super) fn send(self, arguments: &[&OsStr], descriptor: Option<impl AsFd>) -> io::Result<()> {
        let message = arguments.join(OsStr::new("\0"));
        let descriptors: Vec<_> = descriptor.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            rights.push(SendAncillaryMessage::ScmRights(&descriptors));
        }
        rustix::net::sendmsg(&self.ours, &[IoSlice::new(message.as_bytes())], &mut rights, SendFlags::NOSIGNAL)?;
        Ok(())
    }
}

/// The arguments, and the descriptor that came with them.
pub(super) type Received = (Vec<OsString>, Option<OwnedFd>);

/// Waits for the arguments; `None` if the sender was dropped without sending any. The descriptor is closed on exec. Blocks.
pub(super) fn receive(stdin: impl AsFd) -> io::Result<Option<Received>> {
    let mut message = vec![0; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        match rustix::net::recvmsg(&stdin, &mut [IoSliceMut::new(&mut message)], &mut rights, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            received => break received?,
        }
    };
    let message = message.get(..received.bytes).unwrap_or_default();
    if message.is_empty() {
        return Ok(None);
    }
    let descriptor = rights.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut received) => received.next(),
        _ => None,
    });
    let arguments = message.split(|byte| *byte == 0).map(|argument| OsString::from_vec(argument.to_vec()));
    Ok(Some((arguments.collect(), descriptor)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn arguments_arrive_with_their_descriptor() {
        let sender = Sender::new().unwrap();
        let stdin = sender.theirs.try_clone().unwrap();
        let odd = OsStr::from_bytes(b"not \xff UTF-8\n");
        sender.send(&[odd, OsStr::new(""), OsStr::new("2")], Some(io::stderr())).unwrap();
        let (arguments, descriptor) = receive(&stdin).unwrap().unwrap();
        assert_eq!(arguments, [odd, OsStr::new(""), OsStr::new("2")]);
        assert!(descriptor.is_some());
        assert!(receive(&stdin).unwrap().is_none(), "nothing follows the message");
    }

    #[test]
    fn dropped_sender_ends_the_wait() {
        let sender = Sender::new().unwrap();
        let stdin = sender.theirs.try_clone().unwrap();
        drop(sender);
        assert!(receive(stdin).unwrap().is_none());
    }
}
