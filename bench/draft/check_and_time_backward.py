import ctypes, json, sys, os, math, torch, collections
import numpy as np
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel, SDPBackend
OUT=os.environ.get('OUT','.')
cu=ctypes.CDLL('libcuda.so.1'); torch.zeros(1,device='cuda')
def ck(r):
    if r: raise RuntimeError(f'cuda {r}')
ST=np.dtype([("batch","i8"),("row","i8"),("head","i8")]); DV=np.dtype([("divisor","u4"),("multiplier","u4"),("shift","u4"),("padding","u4")])
PARAMS=np.dtype([(n,'u8') for n in 'q k v alibi cu_q cu_k used_q used_k'.split()]+[(n,ST) for n in ('qs','ks','vs','os')]+[(n,'i8') for n in ('lse_batch','lse_head','alibi_batch')]+[(n,DV) for n in ('heads','group','section_heads','section_blocks')]+[(n,'i4') for n in ('query_blocks','batch','sq','sk','d','dv','wl','wr')]+[(n,'f4') for n in ('factor','softcap_in','alibi_factor')]+[(n,'i4') for n in ('negative','aligned','padding')]
 +[(n,'u8') for n in 'o lse dout dlse dq dk dv_out row_stats dq_sum turns'.split()]+[(n,ST) for n in ('dos','dqs','dks','dvs')]+[('key_blocks',DV),('key_heads',DV),('padded_rows','i8'),('scale','f4'),('padding_end','i4')])
def div(n):
    s=(n-1).bit_length(); return (n,((1<<(31+s))//n)+1,s,0)
U=1<<30
class Kernel:
    def __init__(self,path,c):
        self.c=c; self.name=os.path.basename(path)
        data=open(path,'rb').read()+(b'\0' if path.endswith('ptx') else b'')
        m=ctypes.c_void_p(); ck(cu.cuModuleLoadData(ctypes.byref(m),data)); self.m=m; self.f={}
        for n in ('kernel','kernel_pre','kernel_post'):
            f=ctypes.c_void_p(); ck(cu.cuModuleGetFunction(ctypes.byref(f),m,n.encode())); self.f[n]=f
        self.smem=2*(2*c['Bc']*c['d']+(c['q_stages']+c['o_stages'])*c['Br']*c['d']+2*c['Br']*c['Bc'])
        ck(cu.cuFuncSetAttribute(self.f['kernel'],8,self.smem))
    def bind(self,q,k,v,o,lse,do,dq,dk,dv,ws,causal,wl=U,wr=None,softcap=0.,alibi=None,packed=None):
        c=self.c; p=np.zeros((),PARAMS)
        if packed is None: b,n,h,d=q.shape; m,hk=k.shape[1:3]; total=n; batch=b
        else:
            cuq,cuk,n,m=packed; h,d=q.shape[1:]; hk=k.shape[1]; batch=cuq.numel()-1
            p['cu_q']=cuq.data_ptr(); p['cu_k']=cuk.data_ptr()
        for nm,t,sn in (('q',q,'qs'),('k',k,'ks'),('v',v,'vs'),('o',o,'os'),('dout',do,'dos'),('dq',dq,'dqs'),('dk',dk,'dks'),('dv_out',dv,'dvs')):
            p[nm]=t.data_ptr(); s=t.stride(); p[sn]=(s[0],s[1],s[2]) if packed is None else (0,s[0],s[1])
        p['lse']=lse.data_ptr()
        qb=-(-n//c['Br']); kb=-(-m//c['Bc'])
        p['lse_batch']=h*n if packed is None else 0; p['lse_head']=n if packed is None else q.shape[0]
        p['padded_rows']=batch*qb*c['Br'] if packed is None else (q.shape[0]//c['Br']+batch)*c['Br']
        rows=h*int(p['padded_rows'])
        assert ws.numel()>=rows*(2+c['d']), (ws.numel(), rows)
        p['row_stats']=ws.data_ptr(); p['dq_sum']=ws.data_ptr()+rows*8
        p['heads']=div(h); p['group']=div(h//hk); p['section_heads']=div(1); p['section_blocks']=div(qb)
        p['query_blocks']=qb; p['batch']=batch; p['sq']=n; p['sk']=m; p['d']=p['dv']=d
        p['wl']=wl; p['wr']=(0 if causal else U) if wr is None else wr
        sc=d**-.5; L2E=1.4426950408889634
        p['factor']=(softcap if softcap else sc)*L2E; p['softcap_in']=sc/softcap if softcap else 0
        p['alibi_factor']=L2E/float(p['factor'])
        if alibi is not None: p['alibi']=alibi.data_ptr()
        p['aligned']=1; p['key_blocks']=div(kb); p['key_heads']=div(hk); p['scale']=sc
        buf=np.frombuffer(p.tobytes(),'u1').copy()
        def run(only=None):
            st=ctypes.c_void_p(torch.cuda.current_stream().cuda_stream); arr=(ctypes.c_void_p*1)(buf.ctypes.data)
            T=32*c['warps']
            for nm,g,sm in (('kernel_pre',qb*h*batch,0),('kernel',kb*hk*batch,self.smem),('kernel_post',qb*h*batch,0)):
                if only is None or nm==only: ck(cu.cuLaunchKernel(self.f[nm],g,1,1,T,1,1,sm,st,arr,None))
        run.keep=(buf,)
        return run
def reference(q,k,v,do,causal,wl,wr,softcap,alibi):
    Q,K,V=[x.transpose(1,2).double().requires_grad_() for x in (q,k,v)]
    h,hk=Q.shape[1],K.shape[1]; n,m=Q.shape[2],K.shape[2]
    Kr,Vr=K.repeat_interleave(h//hk,1),V.repeat_interleave(h//hk,1)
    S=Q@Kr.transpose(-1,-2)*q.shape[-1]**-.5
    if softcap: S=softcap*torch.tanh(S/softcap)
    i=torch.arange(n,device='cuda')[:,None]+m-n; j=torch.arange(m,device='cuda')[None]
    if alibi is not None: S=S-alibi.double()[None,:,None,None]*(i-j).abs()
    if causal: wr=0
    S=S.masked_fill((j>i+wr)|(j<i-wl),-math.inf)
    L=S.logsumexp(-1); z=torch.isinf(L)
    P=torch.where(z[...,None],0.,torch.exp(S-torch.where(z,0.,L)[...,None])); O=P@Vr
    g=torch.autograd.grad(O,(Q,K,V),do.transpose(1,2).double())
    return O.detach().transpose(1,2), L.detach(), [x.transpose(1,2) for x in g]
def check(kn,general):
    d=kn.c['d']; worst=0
    cases=[(1,384,384,2,2,0,{}),(2,333,517,4,2,1,{}),(1,517,333,2,1,1,{}),(1,500,500,2,2,0,dict(wl=100,wr=30))]
    if general: cases+=[(1,400,300,2,2,1,dict(softcap=20.)),(1,300,400,4,4,0,dict(alibi=torch.rand(4,device='cuda')))]
    for (b,n,m,h,hk,causal,o_) in cases:
        bf=torch.bfloat16
        q,do=(torch.randn(b,n,h,d,device='cuda',dtype=bf) for _ in range(2)); k,v=(torch.randn(b,m,hk,d,device='cuda',dtype=bf) for _ in range(2))
        O,L,g=reference(q,k,v,do,causal,o_.get('wl',U),o_.get('wr',U),o_.get('softcap',0),o_.get('alibi'))
        ob=O.to(bf).contiguous(); lse=L.float().contiguous()
        dq,dk,dv=[torch.full_like(x,math.nan) for x in (q,k,v)]
        ws=torch.full((b*h*(-(-n//128)*128)*(2+d),),math.nan,device='cuda')
        run=kn.bind(q,k,v,ob,lse,do,dq,dk,dv,ws,causal,**o_); run(); torch.cuda.synchronize()
        for nm,x,y in zip(('dq','dk','dv'),(dq,dk,dv),g):
            e=(x.double()-y).abs().max().item(); tol=0.02*y.abs().max().item()+0.02
            if not e<tol: return f'WRONG {nm} {(b,n,m,h,hk,causal,o_)} {e} {tol}'
            worst=max(worst,e)
    # packed against the same sequences alone
    bf=torch.bfloat16; lens=[(100,100),(0,5),(333,200),(64,64)]; h,hk=4,2
    cq=torch.tensor([0]+list(np.cumsum([a for a,_ in lens])),dtype=torch.int32,device='cuda'); ckk=torch.tensor([0]+list(np.cumsum([a for _,a in lens])),dtype=torch.int32,device='cuda')
    tq,tk=int(cq[-1]),int(ckk[-1]); q,do=(torch.randn(tq,h,d,device='cuda',dtype=bf) for _ in range(2)); k,v=(torch.randn(tk,hk,d,device='cuda',dtype=bf) for _ in range(2))
    ob=torch.zeros_like(q); lse=torch.zeros(h,tq,device='cuda'); G=[torch.zeros(x.shape,device='cuda',dtype=torch.double) for x in (q,k,v)]
    for i,(a,c) in enumerate(lens):
        s,t=slice(int(cq[i]),int(cq[i+1])),slice(int(ckk[i]),int(ckk[i+1]))
        if a==0: continue
        O,L,g=reference(q[None,s],k[None,t],v[None,t],do[None,s],1,U,U,0,None); ob[s]=O[0].to(bf); lse[:,s]=L[0].float()
        G[0][s]=g[0][0]; G[1][t]=g[1][0]; G[2][t]=g[2][0]
    dq,dk,dv=[torch.full_like(x,math.nan) for x in (q,k,v)]
    ws=torch.full((h*(tq+4*128)*(2+d),),math.nan,device='cuda')
    kn.bind(q,k,v,ob,lse,do,dq,dk,dv,ws,1,packed=(cq,ckk,333,200))(); torch.cuda.synchronize()
    for nm,x,y in zip(('dq','dk','dv'),(dq,dk,dv),G):
        e=(x.double()-y).abs().max().item()
        if not e<0.02*y.abs().max().item()+0.02: return f'WRONG packed {nm} {e}'
    return f'ok {worst:.4f}'
def bench(ds, seqs=(512,1024,2048,4096,8192,16384)):
    ks=json.load(open('.scratch/cubins/index.json'))
    for d in ds:
        kns=[]
        for name,c in ks:
            if c['d']!=d: continue
            try: kn=Kernel('.scratch/cubins/'+name,c); r=check(kn,c['general'])
            except RuntimeError as e: print(name,'FAIL',e); continue
            print(name,r)
            if not r.startswith('ok'): continue
            kns.append(kn)
        t=collections.defaultdict(list)
        for causal in (0,1):
            for n in seqs:
                b=16384//n; h=2048//d
                q,k,v,do=(torch.randn(b,n,h,d,device='cuda',dtype=torch.bfloat16) for _ in range(4)); dq,dk,dv=[torch.empty_like(x) for x in (q,k,v)]
                qt,kt,vt=[x.transpose(1,2).detach().requires_grad_() for x in (q,k,v)]
                with sdpa_kernel(SDPBackend.FLASH_ATTENTION): o=F.scaled_dot_product_attention(qt,kt,vt,is_causal=bool(causal))
                ob=o.detach().transpose(1,2).contiguous(); lse=torch.full((b,h,n),8.,device='cuda'); ws=torch.empty(b*h*n*(2+d),device='cuda')
                dot=do.transpose(1,2)
                fs={'fa2':lambda: torch.autograd.grad(o,(qt,kt,vt),dot,retain_graph=True)}
                for kn in kns: fs[kn.name]=kn.bind(q,k,v,ob,lse,do,dq,dk,dv,ws,causal)
                for f in fs.values(): f(); f()
                ev={k2:[] for k2 in fs}
                if n==4096 and not causal:
                    for nm,f in fs.items():
                        if nm=='fa2': continue
                        for part in ('kernel_pre','kernel_post'):
                            x=[]
                            for _ in range(7):
                                a,bb=torch.cuda.Event(enable_timing=True),torch.cuda.Event(enable_timing=True); a.record(); f(part); f(part); bb.record(); torch.cuda.synchronize(); x.append(a.elapsed_time(bb)/2*1e3)
                            print(nm,part,f'{sorted(x)[3]:.0f} us')
                for r in range(8):
                    for nm,f in fs.items():
                        a,bb=torch.cuda.Event(enable_timing=True),torch.cuda.Event(enable_timing=True)
                        a.record(); f(); f(); bb.record(); ev[nm].append((a,bb))
                torch.cuda.synchronize()
                fl=10*b*h*n*n*d*(.5 if causal else 1)
                for nm in fs:
                    x=sorted(a.elapsed_time(bb) for a,bb in ev[nm]); t[nm].append(fl/(x[len(x)//2]/2)/1e9)
        gm=lambda x: math.exp(sum(map(math.log,x))/len(x)); L=len(seqs)
        print(f'--- d{d}'); fa=t['fa2']
        for nm in sorted(t,key=lambda nm:-gm(t[nm])):
            x=t[nm]; rt=[u/w for u,w in zip(x,fa)]
            print(f'{nm:38s}',' '.join(f'{u:4.0f}' for u in x[:L]),'|',' '.join(f'{u:4.0f}' for u in x[L:]),f'| {gm(x[:L]):4.0f} {gm(x[L:]):4.0f} | {gm(rt[:L]):.3f} {gm(rt[L:]):.3f} {min(rt):.3f}')
        sys.stdout.flush()
bench([int(x) for x in sys.argv[1:]] or (64,128,256))
