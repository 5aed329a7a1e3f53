// Checks what `mpctf-secure audit prove` has written with nothing of mpctf-secure: the keys come from a roster, and
// golang.org/x/mod/sumdb says whether signatures and proofs hold. verify ROSTER.json PROOF.json
package main

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

type roster struct {
	Roster struct {
		Members []struct{ Name, Role, Log string }
	}
}

type proof struct {
	Checkpoint string
	Leaves     []struct {
		Index     int64
		Leaf      string
		Inclusion []string
	}
	Since       int64
	Root        string
	Consistency []string
}

// key is a log's (kind 1) or a witness's (kind 4): c2sp.org/signed-note and c2sp.org/tlog-cosignature.
type key struct {
	name   string
	kind   byte
	public []byte
}

func (k key) Name() string { return k.name }

func (k key) KeyHash() uint32 {
	sum := sha256.Sum256(append([]byte(k.name+"\n"+string(rune(k.kind))), k.public...))
	return binary.BigEndian.Uint32(sum[:])
}

func (k key) Verify(text, signature []byte) bool {
	if k.kind == 4 {
		if len(signature) != 8+ed25519.SignatureSize {
			return false
		}
		time := binary.BigEndian.Uint64(signature)
		text = []byte(fmt.Sprintf("cosignature/v1\ntime %d\n%s", time, text))
		signature = signature[8:]
	}
	return ed25519.Verify(k.public, text, signature)
}

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func read(path string, into interface{}) {
	data, err := os.ReadFile(path)
	must(err)
	must(json.Unmarshal(data, into))
}

func hash(text string) tlog.Hash {
	data, err := base64.StdEncoding.DecodeString(text)
	must(err)
	var h tlog.Hash
	if len(data) != len(h) {
		must(fmt.Errorf("a hash of %d bytes", len(data)))
	}
	copy(h[:], data)
	return h
}

func hashes(texts []string) []tlog.Hash {
	found := make([]tlog.Hash, len(texts))
	for i, text := range texts {
		found[i] = hash(text)
	}
	return found
}

func main() {
	var members roster
	var given proof
	read(os.Args[1], &members)
	read(os.Args[2], &given)
	origin := strings.SplitN(given.Checkpoint, "\n", 2)[0]
	var known []note.Verifier
	for _, member := range members.Roster.Members {
		public, err := hex.DecodeString(member.Log)
		must(err)
		if strings.HasPrefix(origin, member.Name+"/") {
			known = append(known, key{origin, 1, public})
		} else {
			known = append(known, key{member.Name, 4, public})
		}
	}
	opened, err := note.Open([]byte(given.Checkpoint), note.VerifierList(known...))
	must(err)
	lines := strings.Split(opened.Text, "\n")
	size, err := strconv.ParseInt(lines[1], 10, 64)
	must(err)
	root := hash(lines[2])
	signed := false
	for _, signature := range opened.Sigs {
		signed = signed || signature.Name == origin
	}
	if !signed {
		must(fmt.Errorf("not signed by %s", origin))
	}
	for _, leaf := range given.Leaves {
		must(tlog.CheckRecord(hashes(leaf.Inclusion), size, root, leaf.Index, tlog.RecordHash([]byte(leaf.Leaf))))
	}
	if given.Since > 0 {
		must(tlog.CheckTree(hashes(given.Consistency), size, root, given.Since, hash(given.Root)))
	}
	fmt.Printf("%s: %d leaves, %d witnesses, %d proved\n", origin, size, len(opened.Sigs)-1, len(given.Leaves))
}
